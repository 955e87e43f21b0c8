"""Which samples are left of records, and said to be left out; their tokens are made once, by any number of ranks."""

import os
import re
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch.distributed as dist

from megatron_peft.checkpoint.folders import write_manifest
from megatron_peft.config import ConfigurationError
from megatron_peft.data import instruction
from megatron_peft.data.files import RecordFiles
from megatron_peft.data.instruction import InstructionDataset
from megatron_peft.data.records import ColumnNames, Fit
from megatron_peft.data.tokenizers import HuggingFaceTokenizer, NullTokenizer
from megatron_peft.runtime.launch import gather_over_world, place_on_node, start_world
from tests.checkpoint.test_folders import holder
from tests.data.test_build import build, replaced
from tests.data.test_files import CHATS
from tests.data.test_node_files import start_two_nodes
from tests.data.tiny_tokenizers import save_tokenizer
from tests.ranks import run_ranks
from tests.recorded_calls import recorded_calls
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


def samples_of(dataset: InstructionDataset) -> list[tuple[list, list, list]]:
    rows = (dataset[i] for i in range(len(dataset)))
    return [(row.tokens.tolist(), row.labels.tolist(), row.loss_mask.tolist()) for row in rows]


@pytest.mark.parametrize("overlong", ["truncate", "skip"])
@pytest.mark.parametrize("seq_length", [1, 2, 4, 9])
def test_what_is_read_from_the_cache_is_what_would_be_made(write_lines, tmp_path, seq_length, overlong, monkeypatch):
    monkeypatch.setattr(instruction, "_BATCH", 2)  # several arrays in a file
    records = RecordFiles([write_lines([*RECORDS, RECORDS[0] | {"id": 3}, {"prompt": "", "completion": "7"}])], FLAG)
    fit = Fit(NullTokenizer(99), seq_length, overlong)
    plain, first, second = (InstructionDataset(records, fit, root) for root in (None, tmp_path / "c", tmp_path / "c"))
    for cached in (first, second):
        assert samples_of(cached) == samples_of(plain)
        assert cached.warnings == plain.warnings and cached.lengths.tolist() == plain.lengths.tolist()


@pytest.fixture
def numbers(write_lines) -> tuple[RecordFiles, Fit]:
    return RecordFiles([write_lines(RECORDS)], FLAG), Fit(NullTokenizer(99), 4)


def test_a_second_start_makes_no_tokens_and_overlong_error_holds_for_cached_ones_too(numbers, tmp_path, monkeypatch):
    for _ in range(2):
        with pytest.raises(ConfigurationError, match="line 2: the sample takes 6 tokens, above --seq-length 4"):
            InstructionDataset(numbers[0], Fit(NullTokenizer(99), 4, "error"), tmp_path / "c")
    monkeypatch.setattr(NullTokenizer, "encode", lambda *_: pytest.fail("tokenized again"))
    assert len(InstructionDataset(numbers[0], Fit(NullTokenizer(99), 3), tmp_path / "c")) == 3  # another length too


def test_other_files_tokenizers_templates_and_columns_have_caches_of_their_own(write_lines, tmp_path):
    folder = str(save_tokenizer(tmp_path / "a"))
    numbers, *tokenizers = NullTokenizer(9), NullTokenizer(8), HuggingFaceTokenizer(folder)
    fits = [Fit(one, 4) for one in (*tokenizers, HuggingFaceTokenizer(folder, "{{ messages }}"))]
    fits += [Fit(numbers, 4, columns=ColumnNames(prompt, response="b")) for prompt in (None, "a", "c")]
    records, others = (RecordFiles([write_lines(CHATS[first:], f"{first}.jsonl")], FLAG) for first in (0, 1))
    asked = [(records, Fit(numbers, 4)), (others, Fit(numbers, 4)), *((records, fit) for fit in fits)]
    assert len({instruction.cache_folder(tmp_path, *one) for one in asked}) == len(asked)


def test_tables_are_cached_by_default_and_json_where_a_flag_says_so(write_lines, numbers, tmp_path, cache_of_datasets):
    rows = [{"prompt": "1", "completion": " 2"}] * 4
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "n.parquet")
    lines, own, default = write_lines(rows, "n.jsonl"), tmp_path / "own", cache_of_datasets / "megatron_peft"
    for path, more in ((tmp_path / "n.parquet", {}), (lines, {}), (lines, {"data_cache_path": str(own)})):
        build({"train_data_path": (str(path),), **more})
        assert own.exists() is bool(more) and len(list(default.iterdir())) == 1
    assert len(list(own.iterdir())) == 1
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="cannot be kept in .*give --data-cache-path a folder"):
        InstructionDataset(*numbers, tmp_path / "file")


SHARD = "tokens-00000.arrow"


def other_id(path: Path, wrong: int) -> None:
    """Another id in place of the completion's 4 in the second record."""
    before, after = (np.asarray([3, 99, 1, 2, 3, number], "<i4").tobytes() for number in (4, wrong))
    content = path.read_bytes()
    assert content.count(before) == 1
    path.write_bytes(content.replace(before, after))


DAMAGE: list[tuple[str, Callable[[Path], object], bool, str]] = [  # file, what, with a manifest made anew, told
    (SHARD, partial(other_id, wrong=7), False, f"{SHARD} does not match its checksum"),
    *[
        (SHARD, partial(other_id, wrong=wrong), True, f"the id {wrong} for .*data.jsonl, line 2; those .* below 100")
        for wrong in (10**6, -1)
    ],
    (SHARD, lambda path: os.truncate(path, 40), False, f"{SHARD} has 40 bytes instead of"),
    (SHARD, Path.unlink, False, f"{SHARD} is missing"),
    (SHARD, replaced(os.mkfifo), False, f"{SHARD} is a pipe"),
    (SHARD, replaced(os.mkdir), False, f"{SHARD} is a folder"),
    (SHARD, replaced(lambda path: path.symlink_to("/dev/zero")), False, "a pipe or a device"),
    (SHARD, replaced(lambda path: path.symlink_to("/etc/passwd")), False, "bytes instead of"),
    ("counts.json", partial(Path.write_text, data="{}"), False, "counts.json has 2 bytes instead of"),
    *[
        ("manifest.json", partial(Path.write_text, data=text), False, "manifest.json cannot be read")
        for text in ("{}", "5", "[null]", '{"files": ["../.."]}', '{"files": {"../..": {"size": 1, "crc32": "0"}}}')
    ],
    ("manifest.json", Path.unlink, False, "manifest.json cannot be read"),
    ("manifest.json", replaced(os.mkfifo), False, "manifest.json is a pipe"),
]


@pytest.mark.parametrize(("name", "plant", "is_signed", "told"), DAMAGE)
def test_a_damaged_cache_is_said_with_the_folder_to_remove(numbers, tmp_path, name, plant, is_signed, told):
    InstructionDataset(*numbers, tmp_path / "c")
    (folder,) = (tmp_path / "c").iterdir()
    plant(folder / name)
    if is_signed:
        (folder / "manifest.json").unlink()
        write_manifest(folder, {})
    with pytest.raises(ConfigurationError, match=told) as caught:
        InstructionDataset(*numbers, tmp_path / "c")
    assert str(folder) in str(caught.value)


def test_a_cache_is_on_the_disk_before_it_has_its_name(numbers, tmp_path, monkeypatch):
    calls = recorded_calls(monkeypatch)
    InstructionDataset(*numbers, tmp_path / "c")
    before, _, after = " ".join(f"{name} {path.name}" for name, path in calls).rpartition(" rename ")
    assert all(f"fsync {name} " in before for name in (SHARD, "counts.json", "manifest.json"))
    assert re.search(r"fsync \.tokens-\S+$", before) and re.fullmatch(r"tokens-\w+ fsync c", after)


def test_drafts_of_killed_runs_are_removed_and_those_of_runs_at_work_and_of_other_nodes_stay(numbers, tmp_path):
    root = tmp_path / "c"
    killed, at_work = root / ".tokens-killed", root / ".tokens-at-work"
    for draft in (killed, at_work):
        draft.mkdir(parents=True)
        (draft / SHARD).write_bytes(b"a part")
    (root / ".tokens-note").write_text("a file of somebody's")
    with holder(at_work):
        InstructionDataset(*numbers, root)
    assert (at_work / SHARD).read_bytes() == b"a part" and not killed.exists()
    assert len(list(root.iterdir())) == 3 and (root / ".tokens-note").is_file()
    of_another_node = tmp_path / ".tokens-a.start.1"
    for draft in (of_another_node, tmp_path / ".tokens-a.before.1"):
        draft.mkdir()
    instruction._start_draft(tmp_path / ".tokens-a.start.0").release()
    assert of_another_node.is_dir() and not draft.exists()


def survey_on_a_rank(work: tuple[str, str, Path]) -> None:
    good, bad, root = work
    start_world()
    fit = Fit(NullTokenizer(99), 4)
    for cache_root in (None, root, root):
        dataset = InstructionDataset(RecordFiles([good], FLAG), fit, cache_root)
        assert dataset.lengths.tolist() == [3, 4, 4] and dataset[2].labels.tolist() == [2, 3, 4, 99]
        left_out, *others = dataset.warnings
        assert "(6 would hold all)" in others[0] and dataset.longest_sample == 4
        assert left_out == 'fields that nothing reads were left out: "id" (2 records).'
        assert [warning.partition(" samples")[0] for warning in others] == ["1 of 5"] * 3
        with pytest.raises(ConfigurationError, match="bad.jsonl, line 5: not JSON"):  # of which rank 1 alone can know
            InstructionDataset(RecordFiles([bad], FLAG), fit, cache_root)


def test_ranks_share_the_work_with_and_without_a_cache_and_fail_together(write_lines, tmp_path):
    marked = [RECORDS[0] | {"id": 1}, *RECORDS[1:4], RECORDS[4] | {"id": 2}]
    good, bad = write_lines(marked), write_lines([*RECORDS[:4], "{"], "bad.jsonl")
    run_ranks(2, survey_on_a_rank, (good, bad, tmp_path / "c"))
    (folder,) = (tmp_path / "c").iterdir()  # nothing is left of what failed
    assert len(list(folder.glob("*.arrow"))) == 2


def caches_on_a_rank(work: tuple[str, Path, bool]) -> list[Any]:
    """Starts of four ranks on two nodes, whose caches are one folder or a folder each. What each start tokenized."""
    path, root, is_shared = work
    node = start_two_nodes()
    root = root / ("shared" if is_shared else str(node))
    instruction.MOST_SHARDS, instruction._BATCH = 3, 1
    records, fit, made = RecordFiles([path], FLAG), Fit(NullTokenizer(99), 4), list[int]()
    tokenized = Fit.tokenized
    Fit.tokenized = lambda fit, records, index: made.append(index) or tokenized(fit, records, index)
    plain = samples_of(InstructionDataset(records, fit))
    found = []
    for is_replaced in (False, False, True):
        if is_replaced and dist.get_rank() == 3:
            shutil.rmtree(root)
        dist.barrier()
        made.clear()
        dataset = InstructionDataset(records, fit, root)
        assert samples_of(dataset) == plain
        assert not [path for path in Path("/proc/self/fd").iterdir() if path.resolve().suffix == ".arrow"]
        (folder,) = root.iterdir()
        left_over = [name for name in os.listdir(folder) if name.startswith("part")]
        found.append((sum(gather_over_world(made), []), len(list(folder.glob("*.arrow"))), left_over))
        dist.barrier()
    return found


@pytest.mark.parametrize("is_shared", [True, False])
def test_records_are_tokenized_once_by_all_nodes_and_a_node_without_the_cache_gets_that_of_another(
    is_shared, write_lines, tmp_path
):
    found = run_ranks(4, caches_on_a_rank, (write_lines([*RECORDS[:3], RECORDS[4]] * 5), tmp_path, is_shared))
    each = list(range(20))
    assert found == [[(each, 3, []), ([], 3, []), (each if is_shared else [], 3, [])]] * 4


def test_a_process_alone_makes_a_cache_alone(monkeypatch):
    for variables in ({}, {"LOCAL_WORLD_SIZE": "8", "LOCAL_RANK": "3", "GROUP_RANK": "2"}):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        assert place_on_node() == (0, 1, "0")
