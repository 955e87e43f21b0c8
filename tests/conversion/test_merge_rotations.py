"""BOFT and the Hybrid folded into a weight are what training applied."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_peft.adapters.butterfly import cayley, compose, skew
from megatron_peft.config import PeftConfig
from megatron_peft.conversion.merge import mix, turn


def opened(peft: PeftConfig, tensors: dict[str, torch.Tensor]) -> Any:
    """A checkpoint of one layer."""
    record = SimpleNamespace(config=SimpleNamespace(peft=peft))
    return SimpleNamespace(
        record=record, has=lambda layer, name: name in tensors, tensor=lambda layer, name: tensors[name]
    )


@pytest.mark.parametrize(("side", "features"), [("output", 24), ("input", 16)])
def test_a_turned_weight_is_the_dense_product(side, features):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 16, generator=generator)
    Q = torch.randn(features // 8, 2, 2, 6, generator=generator)
    peft = PeftConfig("boft", boft_block_size=4, boft_factors=2, rotation_side=side)
    adapters = opened(peft, {"Q": Q})
    R = torch.block_diag(*compose(cayley(skew(Q, 4))))
    expected = R @ weight if side == "output" else weight @ R.T
    torch.testing.assert_close(turn(adapters, "decoder.layers.0.mlp.linear_fc2", weight.clone()), expected)


def test_a_mixed_weight_is_the_formula():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 16, generator=generator)
    tensors = {
        "rotation.Q": torch.randn(3, 2, 2, 6, generator=generator),
        "low_rank.A": torch.randn(3, 16, generator=generator),
        "low_rank.B": torch.randn(24, 3, generator=generator),
        "mix": torch.tensor(0.3),
    }
    peft = PeftConfig("hybrid", lora_rank=3, lora_alpha=6, boft_block_size=4, boft_factors=2)
    adapters = opened(peft, tensors)
    R = torch.block_diag(*compose(cayley(skew(tensors["rotation.Q"], 4))))
    low = 2 * tensors["low_rank.B"] @ tensors["low_rank.A"]
    expected = weight + 0.3 * low + 0.7 * (R @ weight - weight)
    torch.testing.assert_close(mix(adapters, "layer", weight.clone()), expected, atol=1e-5, rtol=1e-5)
