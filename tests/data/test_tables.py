"""Tables are read like JSON, and the tokens of records are made once, whatever the number of ranks."""

import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_peft.checkpoint.folders import write_manifest
from megatron_peft.config import ConfigurationError
from megatron_peft.data import files, instruction
from megatron_peft.data.files import RecordFiles
from megatron_peft.data.instruction import InstructionDataset
from megatron_peft.data.records import ColumnNames, Fit
from megatron_peft.data.tokenizers import HuggingFaceTokenizer, NullTokenizer
from megatron_peft.runtime.launch import place_on_node, start_world
from tests.checkpoint.test_folders import holder
from tests.data.test_build import build
from tests.data.test_instruction import RECORDS
from tests.data.tiny_tokenizers import save_tokenizer
from tests.ranks import run_ranks
from tests.recorded_calls import recorded_calls

FLAG = "--train-data-path"
CHATS = [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": f"a {i}"}]} for i in range(5)]


@pytest.fixture(autouse=True)
def cache_of_datasets(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    datasets.disable_progress_bars()
    return folder


@pytest.fixture
def tables(tmp_path) -> dict[str, str]:
    """Kind -> path, all of the same rows."""
    rows = datasets.Dataset.from_list(CHATS)
    rows.to_parquet(tmp_path / "a.parquet")
    rows.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": rows, "test": rows.select([3])}).save_to_disk(tmp_path / "splits")
    (tmp_path / "parquet").mkdir()
    rows.to_parquet(tmp_path / "parquet" / "train-0.parquet")
    paths = {name: str(tmp_path / name) for name in ("a.parquet", "saved", "splits", "parquet")}
    return paths | {"arrow": str(next((tmp_path / "saved").glob("*.arrow")))}


def test_tables_have_the_records_of_json_and_a_blend_may_mix_them(tables, tmp_path, write_lines):
    expected = RecordFiles([write_lines(CHATS)], FLAG)
    for path in tables.values():
        records = RecordFiles([path], FLAG)
        assert [records[i] for i in range(5)] == [expected[i] for i in range(5)]
        assert records.place(2) == f"{path}, row 3"
    assert RecordFiles([f"{tables['splits']}:test"], FLAG)[0] == CHATS[3]
    path = tmp_path / "a.csv"
    path.write_text('prompt,completion\n"1, 2",3\n')
    records = RecordFiles([str(path), write_lines([{"text": "a"}])], FLAG)
    assert records[0] == {"prompt": "1, 2", "completion": 3} and records[1] == {"text": "a"}
    assert records.digest != RecordFiles([str(path)], FLAG).digest


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("none.parquet", None, "none.parquet cannot be read: No such file"),
        ("a.parquet", b"nonsense", "a.parquet cannot be read: ArrowInvalid: Parquet magic bytes not found"),
        ("a.csv", b"", "a.csv cannot be read: EmptyDataError"),
        ("a.csv", b"text\n", "a.csv cannot be read: ValueError: .* no data"),
        ("splits:valid", None, "splits has the splits train, test: give .*splits:train"),
        ("saved:train", None, "saved has no splits: leave :train out"),
    ],
)
def test_a_table_that_cannot_be_read_is_named(tables, tmp_path, name, content, told):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigurationError, match=f"{FLAG} .*{told}"):
        RecordFiles([str(tmp_path / name)], FLAG)


@pytest.mark.parametrize("kind", ["csv", "parquet", "arrow", "folder"])
def test_a_table_of_too_many_columns_is_refused_before_it_is_read(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(files, "MAX_COLUMNS", 2)
    rows, path = datasets.Dataset.from_list([{"prompt": "a", "completion": "b", "c": "d"}]), tmp_path / f"a.{kind}"
    if kind in ("csv", "parquet"):
        getattr(rows, f"to_{kind}")(path)
    else:
        rows.save_to_disk(tmp_path / "a.folder")
        path = next(path.parent.rglob("*.arrow")) if kind == "arrow" else path
    with pytest.raises(ConfigurationError, match=f"{FLAG} .* has 3 columns, and the limit is 2: leave out"):
        RecordFiles([str(path)], FLAG)


def dictionary(path: Path, cell: str, num_rows: int) -> str:
    """A Parquet file of one cell that so many rows repeat."""
    cells = pa.DictionaryArray.from_arrays(pa.array([0] * num_rows, pa.int32()), pa.array([cell]))
    settings = {"compression": "zstd", "store_schema": False, "dictionary_pagesize_limit": 2**27}
    pq.write_table(pa.table({"text": cells}), path, **settings)
    return str(path)


def test_a_small_file_that_unpacks_to_thousands_of_its_size_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match=f"{FLAG} .*a.parquet has .* unpacks to more than 67,108,864"):
        RecordFiles([dictionary(tmp_path / "a.parquet", "w1 " * 10_000, 3000)], FLAG)
    assert len(RecordFiles([dictionary(tmp_path / "a.parquet", "w1 " * 10_000, 1000)], FLAG)) == 1000


def test_a_file_of_large_cells_is_refused_before_many_of_them_are_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "ALWAYS_BYTES", 2**22)
    asked, iterate = [], pq.ParquetFile.iter_batches
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", lambda file, rows: asked.append(rows) or iterate(file, rows))
    for cell_bytes, num_rows, unpacked in ((2**22 + 1, 1, []), (2**21, 300, [1])):
        path = dictionary(tmp_path / "a.parquet", "x" * cell_bytes, num_rows)
        with pytest.raises(ConfigurationError, match=f"{FLAG} .*a.parquet has .* unpacks to more than 4,194,304"):
            RecordFiles([path], FLAG)
        assert asked == unpacked


def test_a_second_line_of_many_cells_is_refused_but_not_one_of_quoted_commas(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(f'prompt,completion\na,"{"b," * 5000}"\n')
    assert len(RecordFiles([str(path)], FLAG)) == 1
    path.write_text(f"prompt,completion\n{'b,' * 5000}\n")
    with pytest.raises(ConfigurationError, match="has 5,001 columns, and the limit is 4,096"):
        RecordFiles([str(path)], FLAG)


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_a_folder_with_a_pipe_or_a_device_is_refused(tmp_path, make):
    (tmp_path / "rows").mkdir()
    make(tmp_path / "rows" / "a.parquet")
    with pytest.raises(ConfigurationError, match="a.parquet is a pipe or a device"):
        RecordFiles([str(tmp_path / "rows")], FLAG)


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


def replaced(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def plant(path: Path) -> None:
        path.unlink()
        make(path)

    return plant


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
        for text in ("5", "[null]", '{"files": ["../.."]}', '{"files": {"../..": {"size": 1, "crc32": "0"}}}')
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
    before, _, after = " ".join(f"{name} {path.name}" for name, path in calls).partition(" rename ")
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


def test_a_process_alone_makes_a_cache_alone(monkeypatch):
    for variables in ({}, {"LOCAL_WORLD_SIZE": "8", "LOCAL_RANK": "3", "GROUP_RANK": "2"}):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        assert place_on_node() == (0, 1, "0")
