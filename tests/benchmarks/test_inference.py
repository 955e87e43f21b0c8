"""Logits, answers and scores of a tiny model are those of transformers and of the harness; a difference is found."""

import copy
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from megatron_peft.benchmarks import inference
from megatron_peft.benchmarks.inference import TASKS, compare_items, our_items, their_items
from megatron_peft.benchmarks.subjects import Setting, on_ranks
from megatron_peft.tasks.prepare import TASKS as ALL_TASKS
from tests.evaluation.local_tasks import write_tasks
from tests.evaluation.worded_llama import WORDS, save_worded_llama
from tests.ranks import run_ranks


def test_split_logits_are_those_of_transformers_and_one_wrong_one_is_found(tiny: Setting, monkeypatch) -> None:
    setting = replace(tiny, tensor_parallel=2, sequence_parallel=True)
    split: list = []
    monkeypatch.setattr(inference, "on_ranks", lambda *call: split or split.extend(on_ranks(*call)) or split)
    (figure,) = inference.logits_figures(setting)
    assert figure.reached and "TP2+SP" in figure.name
    split[-1][0, 1, 2, 3] += 5e-4
    (figure,) = inference.logits_figures(setting)
    assert figure.measured == pytest.approx(5e-4, abs=5e-5) and not figure.reached


def test_answers_and_scores_are_those_of_transformers_and_wrong_ones_are_found(tiny: Setting, monkeypatch) -> None:
    monkeypatch.setattr(inference, "LAYOUTS", ({"tensor_parallel": 1},))
    monkeypatch.setattr(inference, "NUM_PROMPTS", 6)
    compared, compare = [], inference.compare_replies
    monkeypatch.setattr(inference, "compare_replies", lambda *sides: compared.append(sides) or compare(*sides))
    differing, largest, ratio = inference.generation_figures(tiny)
    assert differing.reached and differing.note.startswith("6 prompts")
    assert largest.reached and largest.measured > 0, "two programs never round alike"
    assert ratio.measured > 0
    layout, found, expected = copy.deepcopy(compared[0])
    found.answers[2][3] += 1
    found.log_likelihoods[1] += 1e-3
    differing, largest = compare(layout, found, expected)
    assert (differing.measured, differing.reached) == (1, False)
    assert largest.measured == pytest.approx(1e-3, abs=1e-4) and not largest.reached


def test_a_token_with_boft_is_timed_beside_one_of_the_base(tiny: Setting, monkeypatch) -> None:
    monkeypatch.setattr(inference, "TIMED_NEW", 2)
    seconds, over = inference.boft_generation_figures(tiny)
    base = float(re.findall(r"base alone ([\d.]+) s", seconds.note)[0])
    assert seconds.measured > 0 and over.measured == pytest.approx(seconds.measured / base, rel=0.1)


@pytest.mark.slow
def test_both_backends_give_the_same_and_every_kind_of_difference_is_found(tmp_path: Path) -> None:
    model, names = save_worded_llama(tmp_path / "model"), ("tiny_choices", "tiny_answers")
    tasks = write_tasks(tmp_path / "tasks", WORDS[:50], num_questions=9, stop=" w", longest=280)
    asked = {"tasks": str(tasks), "names": names, "limit": 8}
    ours, theirs = (run_ranks(1, partial(items, **asked), str(model))[0] for items in (our_items, their_items))
    assert {task for task, _ in ours} == set(names) and len(ours) == 16
    differing, largest = compare_items(ours, theirs, "theirs", 1e-4)
    assert differing.measured == 0 and differing.note == "tiny_answers 8, tiny_choices 8"
    assert 0 < largest.measured < 1e-3, "two programs never round alike"
    wrong = copy.deepcopy(ours)
    wrong["tiny_answers", 0]["resps"] = [["something else"]]
    wrong["tiny_choices", 1]["resps"][0][0][0] = -3.0
    wrong["tiny_choices", 2]["acc"] = 7
    del wrong["tiny_choices", 3]
    differing, largest = compare_items(wrong, theirs, "theirs", 1e-4)
    assert differing.measured == 3 and not differing.reached
    assert differing.note.endswith("differing: tiny_answers 0, tiny_choices 2")
    assert largest.measured > 1e-2


def test_every_shipped_task_with_one_answer_is_compared() -> None:
    shipped = {path.stem for path in ALL_TASKS.glob("*.yaml")}
    assert shipped - set(TASKS) == {"humaneval_sampled", "instructions"}  # drawn; only trained on
