"""Which samples are left of records, and said to be left out; their tokens are made once, by any number of ranks."""

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_peft.config import ConfigurationError
from megatron_peft.data import instruction
from megatron_peft.data.files import RecordFiles
from megatron_peft.data.instruction import InstructionDataset, made_once, tokens_of
from megatron_peft.data.records import ColumnNames, Fit
from megatron_peft.data.samples import Sample
from megatron_peft.data.tokenizers import HuggingFaceTokenizer, NullTokenizer
from megatron_peft.runtime.launch import PlaceOnNode, gather_over_world, place_on_node
from tests.data.test_build import build
from tests.data.test_node_files import start_two_nodes
from tests.data.tiny_tokenizers import save_tokenizer
from tests.ranks import run_ranks
from tests.time_limits import seconds

FLAG = "--train-data-path"


def test_a_few_thousand_short_records_take_a_moment(write_lines, hf):
    record = {"prompt": "English: the cat sat on the mat\nFrench:", "completion": " le chat dort"}
    records = RecordFiles([write_lines([record] * 3000)], FLAG)
    begin = time.process_time()
    assert len(InstructionDataset(records, Fit(hf, 64))) == 3000
    assert time.process_time() - begin < seconds(2)  # CPU seconds; 0.5 measured


RECORDS = [
    {"prompt": "1 2", "completion": "3"},  # 3 positions with the end token
    {"prompt": "1 2", "completion": "3 4 5 6"},  # 6: longer than 4
    {"prompt": "1 2 3 4 5", "completion": "6"},  # 6, and 4 hold the prompt alone
    {"prompt": "", "completion": ""},  # the end token alone: nothing to predict
    {"prompt": "1 2 3", "completion": "4"},  # 4
]


def surveyed(write_lines, overlong: str, records=RECORDS):
    lines = RecordFiles([write_lines(records)], FLAG)
    return InstructionDataset(lines, Fit(NullTokenizer(99), 4, overlong))


def test_truncation_cuts_the_end_and_skips_prompts_that_fill_the_sequence(write_lines):
    dataset = surveyed(write_lines, "truncate")
    assert dataset.lengths.tolist() == [len(dataset[i]) for i in range(3)] == [3, 4, 4]
    assert dataset[1].labels.tolist() == [2, 3, 4, 5]
    assert dataset[1].loss_mask.tolist() == [0, 1, 1, 1]
    assert [int(dataset[i].tokens[-1]) for i in range(3)] == [3, 4, 4]
    cut, filled, empty = dataset.warnings
    assert cut.startswith("1 of 5 samples are longer than --seq-length 4 (6 would hold all) and were cut at their")
    assert cut.endswith("data.jsonl, line 2).")
    assert "1 of 5" in filled and "their prompt alone fills it" in filled and "line 3" in filled
    assert "1 of 5" in empty and "have no token to learn from" in empty and "line 4" in empty


def test_skip_leaves_all_overlong_samples_out_and_a_bad_record_ends_the_run_before_it_begins(write_lines):
    longer = {"prompt": "1 2", "completion": "3 4 5 6 7"}  # 7
    dataset = surveyed(write_lines, "skip", [*RECORDS, longer])
    assert dataset.lengths.tolist() == [len(sample) for sample in dataset] == [3, 4] and len(dataset.warnings) == 2
    assert "3 of 6 samples are longer than --seq-length 4 (7 would hold all) and were skipped" in dataset.warnings[0]
    assert surveyed(write_lines, "error", [RECORDS[0], RECORDS[4]]).warnings == []
    for records, overlong, told in (
        ([*RECORDS, longer], "error", r"line 2: .* takes 6 tokens, above --seq-length 4: raise it \(7 holds all"),
        ([RECORDS[0], RECORDS[3]], "error", "line 2: the sample has no token to learn from"),
        ([RECORDS[2]], "truncate", "all 1 samples were skipped .*line 1.*their prompt alone fills it"),
    ):
        with pytest.raises(ConfigurationError, match=told):
            surveyed(write_lines, overlong, records)


def samples_of(dataset: InstructionDataset | list[Sample]) -> list[tuple[list, list, list]]:
    rows = (dataset[i] for i in range(len(dataset)))
    return [(row.tokens.tolist(), row.labels.tolist(), row.loss_mask.tolist()) for row in rows]


@pytest.mark.parametrize("overlong", ["truncate", "skip"])
@pytest.mark.parametrize("seq_length", [1, 2, 4, 9])
def test_samples_and_lengths_are_those_of_the_records_tokens(write_lines, seq_length, overlong):
    records = RecordFiles([write_lines([*RECORDS, RECORDS[0] | {"id": 3}, {"prompt": "", "completion": "7"}])], FLAG)
    fit = Fit(NullTokenizer(99), seq_length, overlong)
    expected = [fit.cut(*fit.tokenized(records, i)) for i in range(len(records))]
    dataset = InstructionDataset(records, fit)
    assert samples_of(dataset) == samples_of([sample for sample in expected if len(sample)])
    assert dataset.lengths.tolist() == [len(sample) for sample in expected if len(sample)]
    assert 'fields that nothing reads were left out: "id" (1 records).' in dataset.warnings


@pytest.fixture
def numbers(write_lines) -> tuple[RecordFiles, Fit]:
    return RecordFiles([write_lines(RECORDS)], FLAG), Fit(NullTokenizer(99), 4)


def test_second_start_makes_no_tokens_and_overlong_error_holds_for_cached_ones_too(numbers, tmp_path, monkeypatch):
    for _ in range(2):
        with pytest.raises(ConfigurationError, match="line 2: the sample takes 6 tokens, above --seq-length 4"):
            InstructionDataset(numbers[0], Fit(NullTokenizer(99), 4, "error"), tmp_path / "c")
    monkeypatch.setattr(NullTokenizer, "encode", lambda *_: pytest.fail("tokenized again"))
    assert len(InstructionDataset(numbers[0], Fit(NullTokenizer(99), 3), tmp_path / "c")) == 3  # another length too


def test_other_files_tokenizers_templates_and_columns_have_other_tokens(write_lines, tmp_path):
    folder = str(save_tokenizer(tmp_path / "a"))
    both = {"a": " 1 ", "b": " 2 ", "text": "3"}
    for records in ([both], [both, both]):
        opened = RecordFiles([write_lines(records)], FLAG)
        fits = [Fit(NullTokenizer(size), 4, columns=ColumnNames(text="text")) for size in (9, 8)]
        fits += [
            Fit(NullTokenizer(9), 4, columns=ColumnNames("a", "b")),
            Fit(NullTokenizer(9), 4, columns=ColumnNames("b", "a")),
        ]
        fits += [
            Fit(HuggingFaceTokenizer(folder, own), 4, columns=ColumnNames(text="text")) for own in (None, "{{ x }}")
        ]
        for fit in fits:
            tokens_of(opened, fit, tmp_path / "c")
    assert len(list((tmp_path / "c" / "generator").iterdir())) == 12


def test_cache_of_tokens_is_where_the_flag_says_or_that_of_datasets(write_lines, numbers, tmp_path, cache_of_datasets):
    lines, own = write_lines([{"prompt": "1", "completion": " 2"}] * 4, "n.jsonl"), tmp_path / "own"
    for more in ({}, {"data_cache_path": str(own)}):
        build({"train_data_path": (lines,), **more})
        assert own.exists() is bool(more) and (cache_of_datasets / "generator").is_dir()
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="cannot be kept in .*give --data-cache-path a folder"):
        InstructionDataset(*numbers, tmp_path / "file")


def other_id(path: Path) -> None:
    """Another id in place of the completion's 4 in the second record."""
    before, after = (np.asarray([3, 99, 1, 2, 3, number], "<i4").tobytes() for number in (4, 10**6))
    content = path.read_bytes()
    assert content.count(before) == 1
    path.write_bytes(content.replace(before, after))


@pytest.mark.parametrize("damage", [other_id, lambda path: os.truncate(path, 40), lambda path: os.truncate(path, 0)])
def test_damaged_cache_is_named_with_the_folder_to_remove(numbers, tmp_path, damage):
    InstructionDataset(*numbers, tmp_path / "c")
    (file,) = (tmp_path / "c" / "generator").rglob("*.arrow")
    damage(file)
    with pytest.raises(ConfigurationError, match=f"tokens of the data in {tmp_path}/c are damaged .*remove the folder"):
        InstructionDataset(*numbers, tmp_path / "c")


def test_bad_record_is_named_and_leaves_no_tokens(write_lines, tmp_path):
    bad = RecordFiles([write_lines([*RECORDS[:4], "{"])], FLAG)
    with pytest.raises(ConfigurationError, match="data.jsonl, line 5: not JSON"):
        InstructionDataset(bad, Fit(NullTokenizer(99), 4), tmp_path / "c")
    assert not [*tmp_path.rglob("*.arrow")] or not [*(tmp_path / "c" / "generator").rglob("*.arrow")]


def test_several_processes_make_the_same_tokens_and_name_the_first_bad_record(write_lines, tmp_path, monkeypatch):
    monkeypatch.setattr(instruction, "RECORDS_OF_A_PROCESS", 1)
    monkeypatch.setattr(instruction, "place_on_node", lambda: PlaceOnNode(0, 2, "0"))
    records, fit = RecordFiles([write_lines(RECORDS * 20)], FLAG), Fit(NullTokenizer(99), 9)
    tokens = tokens_of(records, fit, tmp_path / "c")
    assert [row["ids"] for row in tokens] == [fit.tokenized(records, i).ids for i in range(100)]
    assert len([*(tmp_path / "c" / "generator").rglob("*.arrow")]) == 2
    bad = RecordFiles([write_lines([*RECORDS, {"prompt": 1, "completion": ""}, *RECORDS, "{"])], FLAG)
    with pytest.raises(ConfigurationError, match="data.jsonl, line 6: "):
        tokens_of(bad, fit, tmp_path / "c")


def starts_on_a_rank(work: tuple[str, Path, bool]) -> list[Any]:
    """Starts of four ranks on two nodes, whose caches are one folder or a folder each: what each start tokenized."""
    path, root, is_shared = work
    node = start_two_nodes()
    root = root / ("shared" if is_shared else str(node))
    made, tokenized = list[int](), Fit.tokenized
    Fit.tokenized = lambda fit, records, index: made.append(index) or tokenized(fit, records, index)
    fit, found = Fit(NullTokenizer(99), 4), []
    for _ in range(2):
        made.clear()
        records = made_once(lambda: RecordFiles([path], FLAG, root))
        dataset = InstructionDataset(records, fit, root)
        found.append((samples_of(dataset), gather_over_world(len(made))))
    return found


@pytest.mark.parametrize("is_shared", [True, False])
def test_records_are_tokenized_once_for_each_folder_of_a_cache(is_shared, write_lines, tmp_path):
    path = write_lines([*RECORDS[:3], RECORDS[4]] * 5)
    alone = samples_of(InstructionDataset(RecordFiles([path], FLAG), Fit(NullTokenizer(99), 4)))
    found = run_ranks(4, starts_on_a_rank, (path, tmp_path, is_shared))
    assert found == [[(alone, [20, 0, 0, 0] if is_shared else [20, 0, 20, 0]), (alone, [0] * 4)]] * 4


def test_process_alone_is_the_first_of_its_node(monkeypatch):
    for variables in ({}, {"LOCAL_WORLD_SIZE": "8", "LOCAL_RANK": "3", "GROUP_RANK": "2"}):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        assert place_on_node() == (0, 1, "0")
