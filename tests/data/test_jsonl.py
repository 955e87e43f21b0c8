"""Records of JSON lines and arrays, their places, and what is wrong with them; memory holds the index alone."""

import json
import tracemalloc
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_peft.config import ConfigurationError
from megatron_peft.data import files
from megatron_peft.data.files import Lines, RecordFiles

FLAG = "--train-data-path"


def read(path, content: str | bytes | None = None) -> RecordFiles:
    """The records of a file, which is written first where there is `content`."""
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return RecordFiles([str(path)], FLAG)


def test_records_of_several_files_come_in_order_and_know_their_place(write_lines):
    first = write_lines([{"n": 0}, "", "   ", {"n": 1}], "a.jsonl")
    second = write_lines([{"n": 2, "text": "é\u2028"}], "b.jsonl")
    records = RecordFiles([first, second], FLAG)
    assert [record["n"] for record in (records[i] for i in range(len(records)))] == [0, 1, 2]
    assert records[2]["text"] == "é\u2028"
    assert [records.place(i) for i in range(3)] == [f"{first}, line 1", f"{first}, line 4", f"{second}, line 1"]


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


def test_a_file_that_is_shortened_while_it_is_read_is_named(write_lines):
    """A map of it would end the process without a word."""
    path = write_lines([{"n": number} for number in range(3)])
    records = RecordFiles([path], FLAG)
    with open(path, "r+") as file:
        file.truncate(10)
    assert records[0] == {"n": 0}
    with pytest.raises(ConfigurationError, match="data.jsonl was shortened while it was being read"):
        records[2]


def test_a_line_above_the_limit_is_named_before_it_is_read(write_lines, monkeypatch):
    path = write_lines([{"n": 0}, {"text": "x" * 40}, {"n": 2}])
    monkeypatch.setattr(files, "MAX_LINE_BYTES", 53)
    assert len(RecordFiles([path], FLAG)) == 3
    monkeypatch.setattr(files, "MAX_LINE_BYTES", 52)
    with pytest.raises(ConfigurationError, match="data.jsonl, line 2 is too long, and the limit of a line .*: split"):
        RecordFiles([path], FLAG)


def test_last_line_without_a_line_break_and_windows_line_ends(tmp_path):
    records = read(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"n": 0}\r\n\r\n{"n": 1}')
    assert [records[i]["n"] for i in range(len(records))] == [0, 1]


def test_a_json_file_is_an_array_or_lines(tmp_path):
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
