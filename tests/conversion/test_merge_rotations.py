"""BOFT folded into a weight is the rotation that training applied."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megatron_peft.adapters.boft import cayley, compose, skew
from megatron_peft.config import PeftConfig
from megatron_peft.conversion.merge import turn


@pytest.mark.parametrize(("side", "features"), [("output", 24), ("input", 16)])
def test_a_turned_weight_is_the_dense_product(side, features):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 16, generator=generator)
    Q = torch.randn(features // 8, 2, 2, 6, generator=generator)
    peft = PeftConfig("boft", boft_block_size=4, boft_factors=2, rotation_side=side)
    adapters = SimpleNamespace(record=SimpleNamespace(config=SimpleNamespace(peft=peft)), tensor=lambda layer, name: Q)
    R = torch.block_diag(*compose(cayley(skew(Q, 4))))
    expected = R @ weight if side == "output" else weight @ R.T
    torch.testing.assert_close(turn(adapters, "decoder.layers.0.mlp.linear_fc2", weight.clone()), expected)
