"""Answers survive a kill at any byte, and never serve another model."""

from __future__ import annotations

import pytest

from megatron_peft.config import ConfigurationError
from megatron_peft.evaluation.finished import FinishedRequests


def test_answers_come_back(tmp_path):
    path = tmp_path / "deep" / "scores.requests.jsonl"
    first = FinishedRequests(path, "model")
    keys = [first.key("score", [1, 2], [3]), first.key("score", [1], [2, 3])]
    first.add({keys[0]: [-1.5, True]})
    first.add({keys[1]: [[5, 6], "é"]})
    again = FinishedRequests(path, "model")
    assert again[keys[0]] == [-1.5, True] and again[keys[1]] == [[5, 6], "é"]
    assert again.key("score", [9], [9]) not in again


def test_another_model_or_kind_has_other_keys(tmp_path):
    one, other = (FinishedRequests(tmp_path / "file", model) for model in ("one", "other"))
    assert len({one.key("score", 1), one.key("generate", 1), other.key("score", 1)}) == 3


def test_a_file_that_was_cut_anywhere_loses_no_more_than_its_last_line(tmp_path):
    path = tmp_path / "file"
    FinishedRequests(path, "model").add({"a": 1, "b": "two\nlines", "c": 3})
    whole = path.read_bytes()
    for length in range(len(whole) + 1):
        path.write_bytes(whole[:length])
        known = FinishedRequests(path, "model")
        assert sum(key in known for key in "abc") == whole[:length].count(b"\n")
        known.add({"d": 4})
        again = FinishedRequests(path, "model")
        assert again["d"] == 4 and sum(key in again for key in "abc") == whole[:length].count(b"\n")


@pytest.mark.parametrize("line", ["{torn}", "[]", '{"key": "a"}'])
def test_a_whole_line_that_is_no_answer_is_named(tmp_path, line):
    path = tmp_path / "file"
    FinishedRequests(path, "model").add({"a": 1})
    path.write_text(f"{path.read_text()}{line}\n")
    with pytest.raises(ConfigurationError, match="file:2 is no answered request .*remove the line"):
        FinishedRequests(path, "model")
