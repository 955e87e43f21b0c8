"""Records of JSON lines, arrays and tables, their places, and what is wrong with them; memory holds the index alone."""

import json
import os
import tracemalloc
import zlib
from contextlib import nullcontext, suppress
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_peft.config import ConfigurationError
from megatron_peft.data import files
from megatron_peft.data.files import Lines, RecordFiles

FLAG = "--train-data-path"
CHATS = [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": f"a {i}"}]} for i in range(5)]


def read(path, content: str | bytes | None = None) -> RecordFiles:
    """The records of a file, which is written first where there is `content`."""
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return RecordFiles([str(path)], FLAG)


def test_records_of_several_files_come_in_order_and_know_their_place(write_lines, tmp_path):
    first = write_lines([{"n": 0}, "", "   ", {"n": 1}], "a.jsonl")
    second = write_lines([{"n": 2, "text": "é\u2028"}], "b.jsonl")
    records = RecordFiles([first, second], FLAG)
    assert [record["n"] for record in (records[i] for i in range(len(records)))] == [0, 1, 2]
    assert records[2]["text"] == "é\u2028"
    assert [records.place(i) for i in range(3)] == [f"{first}, line 1", f"{first}, line 4", f"{second}, line 1"]
    # Windows's line ends, and none after the last; an array in a .json file, or lines.
    records = read(tmp_path / "c.jsonl", b'\xef\xbb\xbf{"n": 0}\r\n\r\n{"n": 1}')
    assert [records[i]["n"] for i in range(len(records))] == [0, 1]
    path = tmp_path / "a.json"
    records = read(path, json.dumps([{"n": 0}, {"n": 1}], indent=2))
    assert (len(records), records[1], records.place(1)) == (2, {"n": 1}, f"{path}, record 2")
    assert read(path, '{"n": 0}\n{"n": 1}')[1] == {"n": 1}


def test_a_line_may_be_longer_than_several_parts(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content := b'{"text": "' + b"long " * 400_000 + b'"}\n{"text": "b"}\n')
    size = len(content)
    parts = [files.scan(path, range(size * i // 8, size * (i + 1) // 8))[0] for i in range(8)]
    told = []
    with suppress(ConfigurationError):
        told.append(files.digest_of_scans(path, parts, size))
    assert told == [zlib.crc32(content)]


@given(
    lines=st.lists(st.sampled_from([b"{}", b"", b" ", b"\t\r", b" {}", b"12", b"      "]), max_size=12),
    ends=st.booleans(),
)
def test_lines_that_are_not_blank_are_found_wherever_a_block_ends(tmp_path_factory, lines, ends):
    path = tmp_path_factory.mktemp("lines") / "a.jsonl"
    content = b"\n".join(lines) + b"\n" * ends
    path.write_bytes(content)
    expected = [(number, json.loads(line)) for number, line in enumerate(content.split(b"\n"), 1) if line.strip()]
    for size in (2, 3, 64):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(files, "_BLOCK_BYTES", size)
            found = Lines(path)
        assert found.digest == zlib.crc32(content)
        assert [(found.place(i), found[i]) for i in range(len(found))] == [
            (f"{path}, line {number}", value) for number, value in expected
        ]


@given(
    lines=st.lists(st.sampled_from([b"{}", b"", b" ", b'{"n": 1}', b"      "]), max_size=12),
    ends=st.booleans(),
    num_parts=st.integers(1, 9),
)
def test_a_file_that_is_scanned_in_parts_has_the_index_of_one_that_is_scanned_whole(
    tmp_path_factory, lines, ends, num_parts
):
    path = tmp_path_factory.mktemp("parts") / "a.jsonl"
    path.write_bytes(content := b"\n".join(lines) + b"\n" * ends)
    size = len(content)
    whole, *arrays = files.scan(path, range(size))
    found = [files.scan(path, range(size * i // num_parts, size * (i + 1) // num_parts)) for i in range(num_parts)]
    parts = [part for part, _, _ in found]
    assert files.digest_of_scans(path, parts, size) == zlib.crc32(content) == whole.crc
    assert sum(part.end - part.begin for part in parts) == size, "no byte is summed twice"
    before = [sum(part.records for part in parts[:i]) for i in range(num_parts)]
    assert np.concatenate([starts for _, starts, _ in found]).tolist() == arrays[0].tolist()
    assert np.concatenate([np.array(blanks) + n for n, (_, _, blanks) in zip(before, found, strict=True)]).tolist() == (
        arrays[1].tolist()
    )


def test_scans_that_leave_something_out_are_no_index():
    def scanned(begin: int, end: int) -> files.Scan:
        return files.Scan(1, 0, begin, end, 0, too_long=False)

    assert files.digest_of_scans("a.jsonl", [scanned(0, 3), scanned(3, 5)], 5) == 0
    for scans, problem in (([scanned(0, 3)], "shortened"), ([scanned(0, 2), scanned(3, 5)], "changed")):
        with pytest.raises(ConfigurationError, match=f"a.jsonl was {problem} while it was being read"):
            files.digest_of_scans("a.jsonl", scans, 5)


def test_a_line_above_the_limit_is_named_before_it_is_read(write_lines, monkeypatch):
    path = write_lines([{"n": 0}, {"text": "x" * 40}, {"n": 2}])
    monkeypatch.setattr(files, "MAX_LINE_BYTES", 53)
    assert len(RecordFiles([path], FLAG)) == 3
    monkeypatch.setattr(files, "MAX_LINE_BYTES", 52)
    with pytest.raises(ConfigurationError, match="data.jsonl, line 2 is too long, and the limit of a line .*: split"):
        RecordFiles([path], FLAG)


def test_a_bad_line_is_named_by_file_number_and_character_and_so_is_a_file_that_was_shortened(write_lines):
    path = write_lines([{"n": 0}, "", "{'n': 1}", {"n": 2}])
    records = RecordFiles([path], FLAG)
    assert records[2] == {"n": 2}
    told = r"line 3: not JSON: Expecting property name .*\(character 2\)\. A file holds"
    with pytest.raises(ConfigurationError, match=told):
        records[1]
    with open(path, "r+") as file:  # while it is read; a map of it would end the process without a word
        file.truncate(10)
    assert records[0] == {"n": 0}
    with pytest.raises(ConfigurationError, match="data.jsonl was shortened while it was being read"):
        records[2]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", '[{"n": 1}, ', "a.json: not JSON"),
        ("a.jsonl", "", "--train-data-path .*a.jsonl is empty"),
        ("a.jsonl", "\n \n", "--train-data-path .*a.jsonl is empty"),
        ("a.json", "[]", "--train-data-path .*a.json is empty"),
        ("nowhere.jsonl", None, "nowhere.jsonl cannot be read: No such file"),
        *[
            ("a.jsonl", '"\u00e9"\n'.encode(encoding), r"a\.jsonl, line 1: not text in UTF-8: .*Save the file as UTF-8")
            for encoding in ("utf-16", "utf-16-le", "utf-32-be", "latin-1")
        ],
    ],
)
def test_a_file_that_holds_no_records_is_named(tmp_path, name, content, message):
    with pytest.raises(ConfigurationError, match=message):
        read(tmp_path / name, content)[0]


def test_memory_is_the_index_and_not_the_records(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "%s"}\n' % ("x" * 2000) * 5000)
    tracemalloc.start()
    records = read(path)
    assert len(records[4999]["text"]) == 2000
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert path.stat().st_size > 10_000_000
    assert peak_bytes < 500_000


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
    assert records[0] == {"prompt": "1, 2", "completion": "3"} and records[1] == {"text": "a"}
    assert records.digest != RecordFiles([str(path)], FLAG).digest


def test_a_path_with_brackets_is_no_pattern(tmp_path, monkeypatch):
    """A folder with them, which `datasets` would search for as a pattern, is refused by name."""
    (tmp_path / "a[1]").mkdir()
    names = ["train1.parquet", "train[1].parquet", "a[1]/train1.parquet"]
    monkeypatch.chdir(tmp_path)
    for name in names:
        datasets.Dataset.from_list([{"text": name}]).to_parquet(name)
    for name in names:
        assert RecordFiles([name], FLAG)[0]["text"] == name
    with pytest.raises(ConfigurationError, match=r"--train-data-path a\[1\]: .* a pattern: rename it"):
        RecordFiles(["a[1]"], FLAG)


@pytest.mark.parametrize("in_a_folder", [False, True])
def test_a_cell_of_a_csv_is_the_text_in_the_file(tmp_path, in_a_folder):
    cells = ["None", "NA", "null", "04", "1e5", "True", " ", ""]
    (tmp_path / "rows").mkdir()
    path = tmp_path / "rows" / "train.csv"
    path.write_text("prompt,completion\n" + "".join(f"{number},{cell}\n" for number, cell in enumerate(cells)))
    records = RecordFiles([str(path.parent if in_a_folder else path)], FLAG)
    expected = [{"prompt": str(number), "completion": cell} for number, cell in enumerate(cells)]
    assert [records[i] for i in range(len(records))] == expected


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
    if kind == "csv":  # the second line counts too, but not its quoted commas
        for second, too_many in (('a,"b,b,b,b"', False), ("a,b,c", True)):
            path.write_text(f"prompt,completion\n{second}\n")
            with pytest.raises(ConfigurationError, match="has 3 columns") if too_many else nullcontext():
                assert len(RecordFiles([str(path)], FLAG)) == 1


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


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_a_folder_with_a_pipe_or_a_device_is_refused(tmp_path, make):
    (tmp_path / "rows").mkdir()
    make(tmp_path / "rows" / "a.parquet")
    with pytest.raises(ConfigurationError, match="a.parquet is a pipe or a device"):
        RecordFiles([str(tmp_path / "rows")], FLAG)
