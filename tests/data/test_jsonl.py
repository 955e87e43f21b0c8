from __future__ import annotations

import json
import tracemalloc

import pytest

from megatron_peft.config import ConfigurationError
from megatron_peft.data.jsonl import JsonRecords

FLAG = "--train-data-path"


def test_records_of_several_files_come_in_order_and_know_their_place(write_lines):
    first = write_lines([{"n": 0}, "", "   ", {"n": 1}], "a.jsonl")
    second = write_lines([{"n": 2, "text": "é\u2028"}], "b.jsonl")
    records = JsonRecords([first, second], FLAG)
    assert [record["n"] for record in (records[i] for i in range(len(records)))] == [0, 1, 2]
    assert records[2]["text"] == "é\u2028"
    assert [records.place(i) for i in range(3)] == [f"{first}, line 1", f"{first}, line 4", f"{second}, line 1"]


def test_last_line_without_a_line_break_and_windows_line_ends(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"n": 0}\r\n\r\n{"n": 1}')
    records = JsonRecords([str(path)], FLAG)
    assert [records[i]["n"] for i in range(len(records))] == [0, 1]


def test_a_json_array_is_read_too(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"n": 0}, {"n": 1}], indent=2))
    records = JsonRecords([str(path)], FLAG)
    assert (len(records), records[1], records.place(1)) == (2, {"n": 1}, f"{path}, record 2")


def test_lines_in_a_json_file_are_lines(write_lines):
    assert JsonRecords([write_lines([{"n": 0}, {"n": 1}], "a.json")], FLAG)[1] == {"n": 1}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{'n': 1}", r"data.jsonl, line 3: not JSON: Expecting property name .*\(character 2\)"),
        ('{"n": 1', "data.jsonl, line 3: not JSON"),
        ('["n"]', "data.jsonl, line 3: not a JSON object but list"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(write_lines, line, message):
    records = JsonRecords([write_lines([{"n": 0}, "", line, {"n": 2}])], FLAG)
    assert records[2] == {"n": 2}
    with pytest.raises(ConfigurationError, match=message):
        records[1]


def test_bytes_that_are_not_utf8_are_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"n": "\xff"}\n')
    with pytest.raises(ConfigurationError, match="a.jsonl, line 1: not JSON: .*utf-8"):
        JsonRecords([str(path)], FLAG)[0]


@pytest.mark.parametrize(("name", "content"), [("a.jsonl", ""), ("a.jsonl", "\n \n"), ("a.json", "[]")])
def test_an_empty_file_is_an_error(tmp_path, name, content):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(ConfigurationError, match=f"--train-data-path .*{name} is empty"):
        JsonRecords([str(path)], FLAG)


def test_a_missing_file_and_a_folder_are_errors(tmp_path):
    with pytest.raises(ConfigurationError, match="nowhere.jsonl cannot be read: No such file"):
        JsonRecords([str(tmp_path / "nowhere.jsonl")], FLAG)
    with pytest.raises(ConfigurationError, match="cannot be read: Is a directory"):
        JsonRecords([str(tmp_path)], FLAG)


def test_a_torn_array_names_its_file(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[{"n": 1}, ')
    with pytest.raises(ConfigurationError, match="a.json: not JSON"):
        JsonRecords([str(path)], FLAG)


def test_memory_is_the_index_and_not_the_records(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "%s"}\n' % ("x" * 2000) * 5000)
    tracemalloc.start()
    records = JsonRecords([str(path)], FLAG)
    assert len(records[4999]["text"]) == 2000
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert path.stat().st_size > 10_000_000
    assert peak_bytes < 500_000
