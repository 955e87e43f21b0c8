"""Answers and scores of a tiny model are those of transformers; a difference is found."""

from __future__ import annotations

import copy

import pytest

from megatron_peft.benchmark import generation
from megatron_peft.benchmark.subjects import Setting


def test_answers_and_scores_are_those_of_transformers_and_wrong_ones_are_found(
    tiny: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation, "LAYOUTS", ({"tensor_parallel": 1},))
    monkeypatch.setattr(generation, "NUM_PROMPTS", 6)
    compared, compare = [], generation.compare
    monkeypatch.setattr(generation, "compare", lambda *sides: compared.append(sides) or compare(*sides))
    differing, largest, ratio = generation.generation_figures(tiny, turns=1)
    assert differing.reached and differing.note.startswith("6 prompts")
    assert largest.reached and largest.measured > 0, "two programs never round alike"
    assert ratio.measured > 0
    layout, found, expected = copy.deepcopy(compared[0])
    found.answers[2][3] += 1
    found.log_likelihoods[1] += 1e-3
    differing, largest = compare(layout, found, expected)
    assert (differing.measured, differing.reached) == (1, False)
    assert largest.measured == pytest.approx(1e-3, abs=1e-4) and not largest.reached
