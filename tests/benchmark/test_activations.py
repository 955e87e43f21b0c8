"""What autograd keeps is counted once, and of the right things."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from megatron_peft.benchmark import activations
from megatron_peft.benchmark.subjects import Setting


def test_each_storage_counts_once_and_weights_do_not():
    weight = nn.Linear(4, 4, bias=False)
    x = torch.randn(10, 4, requires_grad=True)
    saved = activations.SavedBytes(weight)
    with saved:
        y = weight(x)
        (y * x + y.exp()).sum()
    assert saved.num_bytes == 3 * 10 * 4 * 4  # x, y and exp(y)


def test_extras_are_divided_by_layers_and_compared(monkeypatch: pytest.MonkeyPatch, tiny: Setting):
    kept = {"frozen": 100, "lora": 140, "boft": 120, "urnn": 180, "hybrid": 150}
    monkeypatch.setattr(activations, "run_ranks", lambda *args, **kwargs: [kept])
    figures = activations.activations_figures(tiny)
    assert [figure.measured for figure in figures] == pytest.approx([20 / 40, 80 / 40, 50 / 60])
    assert [figure.reached for figure in figures] == [True, False, True]
