"""What is checked before tools/generate.py and tools/evaluate.py ask a model: settings, prompts, tasks; and the stream.

Answers and whole evaluations are in test_harness.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_peft.config import ConfigurationError
from megatron_peft.evaluation import harness_tasks
from megatron_peft.evaluation.answers import AnswerSettings, Stream
from megatron_peft.evaluation.harness_run import HarnessSettings
from megatron_peft.evaluation.harness_tasks import find_tasks
from megatron_peft.evaluation.progress import request_bar
from megatron_peft.evaluation.prompts import encode_prompts, read_prompts
from megatron_peft.evaluation.sampling import Sampling
from megatron_peft.evaluation.stop import StopTexts
from tests.evaluation.local_tasks import write_tasks

BYTES: Any = SimpleNamespace(  # a byte an id
    special_tokens={},
    prefix_id=1,
    encode=lambda text: list(text.encode()),
    decode=lambda ids: bytes(ids).decode(errors="replace"),
    encode_prompt=lambda text: [0, *text.encode()] if text else [],
    render_chat=lambda messages, add_generation_prompt=False: (
        "".join(f"<{message['content']}>" for message in messages) + "?" * add_generation_prompt
    ),
)


@pytest.mark.parametrize(
    ("answer", "grown", "ended"),
    [
        ("café".encode(), "café", "café\n"),
        ("é".encode()[:1], "", "\ufffd\n"),  # half a character waits
        (b"one\nQ:two", "one", "one\n"),  # a stop is never shown
        (b"one\nQ", "one", "one\nQ\n"),  # and what may become one is held back
    ],
)
def test_the_text_grows_but_for_half_a_character_and_what_may_be_a_stop(answer, grown, ended):
    written: list[str] = []
    stream = Stream(BYTES, StopTexts(BYTES, ["\nQ:"] if b"\n" in answer else []), written.append)
    for token in answer:
        stream.add(0, token)
    assert "".join(written) == grown
    stream.end()
    assert "".join(written) == ended


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (lambda: Sampling(temperature=-1.0), "--temperature is -1.0; it cannot be negative"),
        (lambda: Sampling(top_k=-1), "--top-k is -1"),
        (lambda: Sampling(top_p=0.0), "--top-p is 0.0; it is a probability, above 0 and at most 1"),
        (lambda: AnswerSettings("a", "b"), "exactly one of"),
        (lambda: AnswerSettings("a", num_samples=3), "--num-samples 3 with --temperature 0 gives one answer 3 times"),
        (lambda: AnswerSettings("a", max_new_tokens=0), "--max-new-tokens is 0; it must be above 0"),
        (lambda: HarnessSettings([], "", limit=2.5), "--limit is 2.5; it is a number of questions, or below 1 a share"),
        (lambda: HarnessSettings([], "", limit=0), "--limit is 0; it must be above 0"),
        (lambda: HarnessSettings([], "", batch_size=0), "--batch-size is 0"),
        (lambda: HarnessSettings([], "", num_fewshot=-1), "--num-fewshot is -1; it cannot be negative"),
    ],
)
def test_settings_out_of_range_and_contradictions_are_told(settings, message):
    with pytest.raises(ConfigurationError, match=message):
        settings()


def test_a_stop_text_writes_a_new_line_as_backslash_n_and_a_prompt_stands_as_it_is():
    settings = AnswerSettings(prompt="$\\theta$", stop=["\\n\\n"], temperature=0.5, top_k=3, sampling_seed=9)
    assert settings.records() == [{"prompt": "$\\theta$"}]
    assert settings.plan.until == ("\n\n",)
    assert (settings.plan.sampling.temperature, settings.plan.sampling.top_k, settings.plan.seed) == (0.5, 3, 9)


def test_a_file_that_cannot_be_written_is_told_before_anything_is_asked(tmp_path):
    (tmp_path / "file").touch()
    for output, message in ((tmp_path, "is a folder: give a file"), (tmp_path / "file" / "x", "cannot be written")):
        with pytest.raises(ConfigurationError, match=f"--output {output} {message}"):
            AnswerSettings(prompt="a", output=str(output)).records()
    AnswerSettings(prompt="a", output=str(tmp_path / "new" / "out.jsonl")).records()
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.txt", "one\n\n{two\n", [{"prompt": "one"}, {"prompt": "{two"}]),
        ("a.jsonl", '{"prompt": "x", "id": 3}\n', [{"prompt": "x", "id": 3}]),
        ("a.jsonl", '{"prompt": "x"}\nx\n', r"a\.jsonl:2: not JSON"),
        ("a.jsonl", '{"text": "x"}\n', r'a\.jsonl:1: neither {"prompt": "..."} nor'),
        ("a.jsonl", "[1]\n", r"a\.jsonl:1: neither"),
        ("a.jsonl", '{"messages": "hi"}', r"a\.jsonl:1: neither"),
        ("a.txt", "\n", "holds no prompt"),
        ("a.txt", None, "--prompt-file .*a.txt cannot be read"),
    ],
)
def test_a_file_holds_a_prompt_a_line_and_wrong_lines_are_named(tmp_path, name, text, expected):
    if text is not None:
        (tmp_path / name).write_text(text)
    if isinstance(expected, list):
        assert read_prompts(tmp_path / name) == expected
    else:
        with pytest.raises(ConfigurationError, match=expected):
            read_prompts(tmp_path / name)


def test_prompts_and_conversations_become_ids():
    records = [{"prompt": "a"}, {"prompt": ""}, {"messages": [{"role": "user", "content": "b"}]}]
    assert encode_prompts(records, BYTES, False, 9) == [[0, 97], [1], [60, 98, 62, 63]]
    assert encode_prompts(records[:1], BYTES, True, 9) == [[60, 97, 62, 63]]


def test_a_prompt_leaves_room_for_a_token():
    with pytest.raises(ConfigurationError, match="prompt 1 has 4 tokens, but the model has 4 positions"):
        encode_prompts([{"prompt": "abc"}], BYTES, False, 4)


def test_a_log_has_a_line_at_each_tenth(capsys):
    with request_bar("scoring", 40, done=2) as advance:
        for _ in range(19):
            advance(2)
    with request_bar("nothing", 0):
        pass
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "scoring: 4 of 40" and lines[-1] == "scoring: 40 of 40"
    assert len(lines) == 10


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


def test_known_tasks_are_found_and_an_unknown_one_is_told(folder):
    assert "tiny_choices" in find_tasks(["tiny_choices", "tiny_texts"], [str(folder)]).all_tasks
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
