"""The split model's logits are compared with transformers' over the true vocabulary."""

from __future__ import annotations

import pytest
import torch

from megatron_peft.benchmark import logits
from megatron_peft.benchmark.subjects import Setting
from tests.tiny_llama import VOCAB_SIZE


def test_split_logits_are_those_of_transformers(tiny: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logits, "LAYOUTS", ({"tensor_parallel": 2, "sequence_parallel": True},))
    (figure,) = logits.logits_figures(tiny)
    assert figure.reached and "TP2+SP" in figure.name


def test_one_wrong_logit_is_found(tiny: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = torch.zeros(tiny.rows, tiny.positions, VOCAB_SIZE)
    wrong[1, 2, 3] = 5e-4
    monkeypatch.setattr(logits, "LAYOUTS", ({"pipeline_parallel": 2},))
    monkeypatch.setattr(logits, "_logits_of_transformers", lambda setting: torch.zeros_like(wrong))
    monkeypatch.setattr(logits, "run_ranks", lambda num_ranks, target, setting: [None, wrong])
    (figure,) = logits.logits_figures(tiny)
    assert figure.measured == pytest.approx(5e-4) and not figure.reached
