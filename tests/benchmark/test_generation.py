"""Answers and scores of a tiny model are those of transformers; a difference is found."""

from __future__ import annotations

import pytest

from megatron_peft.benchmark import generation
from megatron_peft.benchmark.generation import Replies, compare
from megatron_peft.benchmark.subjects import Setting


def test_answers_scores_and_times_of_a_tiny_model(tiny: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "LAYOUTS", ({"tensor_parallel": 1},))
    monkeypatch.setattr(generation, "NUM_PROMPTS", 6)
    differing, largest, ratio = generation.generation_figures(tiny, turns=1)
    assert differing.reached and differing.note.startswith("6 prompts")
    assert largest.reached and largest.measured > 0, "two programs never round alike"
    assert 0 < ratio.measured < 20


def test_one_wrong_token_and_one_wrong_score_are_found() -> None:
    right = Replies([[1, 2], [3, 4]], [-1.0, -2.0])
    wrong = Replies([[1, 2], [3, 5]], [-1.0, -2.001])
    differing, largest = compare("TP1", wrong, right)
    assert differing.measured == 1 and not differing.reached
    assert largest.measured == pytest.approx(1e-3) and not largest.reached
