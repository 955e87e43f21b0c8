"""What autograd keeps is counted once, and of the right things."""

from __future__ import annotations

from dataclasses import replace

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


def test_twice_the_rank_keeps_twice_the_narrow_activations(even: Setting):
    """[tokens, rank] in float32 of four linear layers in each of four; only LoRA and the Hybrid have a rank."""
    kept, wider = (activations.count_methods(replace(even, rank=rank)) for rank in (4, 8))
    narrow = 4 * 4 * even.rows * even.positions * 4 * 4
    grown = {name: wider[name] - kept[name] for name in kept}
    assert grown == {"frozen": 0, "lora": narrow, "boft": 0, "urnn": 0, "hybrid": narrow}
