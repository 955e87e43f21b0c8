"""Settings and tasks of tools/evaluate.py are checked before a model is loaded: ranges, names, folders, data.

Whole evaluations are in test_harness.py.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_peft.config import ConfigurationError
from megatron_peft.evaluation import harness_tasks
from megatron_peft.evaluation.harness_run import HarnessSettings
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


def _refused(message, *names, folders, **settings):
    with pytest.raises(ConfigurationError, match=message):
        find_tasks(names, list(map(str, folders)), **settings)


def test_known_tasks_are_found_and_an_unknown_one_is_answered_with_the_nearest(folder):
    assert "tiny_choices" in find_tasks(["tiny_choices", "tiny_texts"], [str(folder)]).all_tasks
    _refused("--tasks tiny_choice: no task has this name; did you mean tiny_cho", "tiny_choice", folders=[folder])
    _refused("--tasks xyz: .*--include-path FOLDER", "xyz", folders=[folder])
    _refused("--include-path nowhere: no such folder", "tiny_choices", folders=[folder, "nowhere"])
    assert "did you mean" not in harness_tasks._unknown("qqq", ["gsm8k", "sst2"])


QUESTION = {"question": "a", "choices": ["a", "b", "c", "d"], "label": 0}


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([{"query": "a", "answer": "b"}], "tiny_choices cannot be loaded: its data lacks a column .*'question'"),
        (None, "--tasks tiny_choices cannot be loaded: .*questions.jsonl"),
        ([QUESTION, {**QUESTION, "label": 7}], "label of item 1 is 7; choices are numbered from 0 to"),
        ([{**QUESTION, "label": 7}, QUESTION], "cannot be loaded: the first item's label is none of its choices"),
    ],
    ids=["other columns", "no data", "label of a later item", "label of the first"],
)
def test_data_that_does_not_fit_its_task_is_told(folder, items, message):
    path = folder / "questions.jsonl"
    path.unlink()
    if items:
        path.write_text("".join(json.dumps(one) + "\n" for one in items))
    _refused(message, "tiny_choices", folders=[folder])


def test_a_task_of_scored_items_only_shows_none_of_them(folder):
    message = "--num-fewshot 1: --tasks tiny_choices has no items but those that are"
    _refused(message, "tiny_choices", folders=[folder], num_fewshot=1)
    find_tasks(["tiny_choices"], [str(folder)], num_fewshot=0)


def test_files_lie_beside_the_results():
    settings = HarnessSettings(["task"], "runs/scores.json", limit=0.5)
    assert settings.beside("requests") == Path("runs/scores.requests.jsonl")
