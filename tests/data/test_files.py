"""Records of JSON lines, arrays and tables, their places, and what is wrong with them."""

import json
import os

import datasets
import pytest

from megatron_peft.config import ConfigurationError
from megatron_peft.data.files import RecordFiles

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


def test_a_bad_line_is_named_by_file_number_and_character(write_lines):
    records = RecordFiles([write_lines([{"n": 0}, "", "{'n': 1}", {"n": 2}])], FLAG)
    assert records[2] == {"n": 2}
    told = r"line 3: not JSON: Expecting property name .*\(character 2\)\. A file holds"
    with pytest.raises(ConfigurationError, match=told):
        records[1]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", '[{"n": 1}, ', "a.json: not JSON"),
        ("a.jsonl", "", "--train-data-path .*a.jsonl is empty"),
        ("a.jsonl", "\n \n", "--train-data-path .*a.jsonl is empty"),
        ("a.json", "[]", "--train-data-path .*a.json is empty"),
        ("nowhere.jsonl", None, "nowhere.jsonl cannot be read: No such file"),
        *[
            ("a.jsonl", '"\u00e9"\n'.encode(encoding), r"a\.jsonl is not text in UTF-8: .*Save it as UTF-8")
            for encoding in ("utf-16", "utf-16-le", "latin-1")
        ],
    ],
)
def test_a_file_that_holds_no_records_is_named(tmp_path, name, content, message):
    with pytest.raises(ConfigurationError, match=message):
        read(tmp_path / name, content)[0]


def test_file_with_other_contents_is_read_again_although_its_time_and_size_are_the_same(write_lines):
    path = write_lines([{"n": 1}])
    before, first = os.stat(path), RecordFiles([path], FLAG)
    write_lines([{"n": 2}])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    second = RecordFiles([path], FLAG)
    assert (first[0], second[0]) == ({"n": 1}, {"n": 2}) and first.digest != second.digest


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


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_a_folder_with_a_pipe_or_a_device_is_refused(tmp_path, make):
    (tmp_path / "rows").mkdir()
    make(tmp_path / "rows" / "a.parquet")
    with pytest.raises(ConfigurationError, match="a.parquet is a pipe or a device"):
        RecordFiles([str(tmp_path / "rows")], FLAG)
