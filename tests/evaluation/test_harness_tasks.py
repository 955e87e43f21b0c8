"""Tasks are checked before a model is loaded: names, folders, data."""

from __future__ import annotations

import json

import pytest

from megatron_peft.config import ConfigurationError
from megatron_peft.evaluation import harness_tasks
from megatron_peft.evaluation.harness_tasks import find_tasks
from tests.evaluation.local_tasks import write_tasks


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of tasks. The harness's own thousands are not read."""
    import lm_eval.tasks

    plain = lm_eval.tasks.TaskManager
    monkeypatch.setattr(
        lm_eval.tasks, "TaskManager", lambda include_path, include_defaults=False: plain(None, include_path, False)
    )
    return write_tasks(tmp_path / "tasks", ["a", "b"], num_questions=2)


def test_known_tasks_are_found(folder):
    assert "tiny_choices" in find_tasks(["tiny_choices", "tiny_texts"], [str(folder)]).all_tasks


def test_an_unknown_task_is_answered_with_the_nearest(folder):
    with pytest.raises(ConfigurationError, match="--tasks tiny_choice: no task has this name; did you mean tiny_cho"):
        find_tasks(["tiny_choice"], [str(folder)])
    with pytest.raises(ConfigurationError, match="--tasks xyz: .*--include-path FOLDER"):
        find_tasks(["xyz"], [str(folder)])


def test_a_missing_folder_is_told(folder):
    with pytest.raises(ConfigurationError, match="--include-path nowhere: no such folder"):
        find_tasks(["tiny_choices"], [str(folder), "nowhere"])


def test_data_with_other_columns_is_told(folder):
    (folder / "questions.jsonl").write_text(json.dumps({"query": "a", "answer": "b"}) + "\n")
    with pytest.raises(ConfigurationError, match="tiny_choices cannot be loaded: its data lacks a column .*'question'"):
        find_tasks(["tiny_choices"], [str(folder)])


def test_missing_data_is_told(folder):
    (folder / "questions.jsonl").unlink()
    with pytest.raises(ConfigurationError, match="--tasks tiny_choices cannot be loaded: .*questions.jsonl"):
        find_tasks(["tiny_choices"], [str(folder)])


def test_the_near_is_named_only_if_it_is_near():
    assert "did you mean gsm8k?" in harness_tasks._unknown("gsm8", ["gsm8k", "sst2"])
    assert "did you mean" not in harness_tasks._unknown("qqq", ["gsm8k", "sst2"])


def test_a_label_that_is_no_choice_is_told_wherever_it_stands(folder):
    path = folder / "questions.jsonl"
    first, second = map(json.loads, path.read_text().splitlines())
    path.write_text("".join(json.dumps(one) + "\n" for one in (first, {**second, "label": 7})))
    with pytest.raises(ConfigurationError, match="label of item 1 is 7; choices are numbered from 0 to"):
        find_tasks(["tiny_choices"], [str(folder)])
    path.write_text("".join(json.dumps(one) + "\n" for one in ({**first, "label": 7}, second)))
    with pytest.raises(ConfigurationError, match="cannot be loaded: the first item's label is none of its choices"):
        find_tasks(["tiny_choices"], [str(folder)])


def test_a_task_of_scored_items_only_shows_none_of_them(folder):
    with pytest.raises(
        ConfigurationError, match="--num-fewshot 1: --tasks tiny_choices has no items but those that are"
    ):
        find_tasks(["tiny_choices"], [str(folder)], num_fewshot=1)
    find_tasks(["tiny_choices"], [str(folder)], num_fewshot=0)
