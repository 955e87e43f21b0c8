"""The split model's logits are compared with transformers' over the true vocabulary."""

from __future__ import annotations

import functools

import pytest

from megatron_peft.benchmark import logits
from megatron_peft.benchmark.subjects import Setting


def test_split_logits_are_those_of_transformers_and_one_wrong_one_is_found(
    tiny: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logits, "LAYOUTS", ({"tensor_parallel": 2, "sequence_parallel": True},))
    monkeypatch.setattr(logits, "_logits", functools.cache(logits._logits))
    (figure,) = logits.logits_figures(tiny)
    assert figure.reached and "TP2+SP" in figure.name
    wrong = logits._logits_of_transformers(tiny)
    wrong[1, 2, 3] += 5e-4
    monkeypatch.setattr(logits, "_logits_of_transformers", lambda setting: wrong)
    (figure,) = logits.logits_figures(tiny)
    assert figure.measured == pytest.approx(5e-4, abs=5e-5) and not figure.reached
