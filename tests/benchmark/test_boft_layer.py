"""The three layers that are timed compute what they are said to."""

from __future__ import annotations

import pytest
import torch

from megatron_peft.benchmark import boft_layer
from tests.one_rank import one_rank


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("peft")
    monkeypatch.setattr(boft_layer, "WIDTH", 64)
    monkeypatch.setattr(boft_layer, "NUM_TOKENS", 8)


def test_layers_start_as_linear_ones_and_have_the_same_number_of_blocks(small):
    with one_rank():
        ours, theirs = boft_layer._boft(), boft_layer._hf_boft()
        x = torch.randn(8, 1, 64)
        weight = theirs.base_model.model[0].base_layer.weight
        torch.testing.assert_close(theirs(x), x @ weight.t())
        rotations = dict(theirs.named_parameters())["base_model.model.0.boft_R.default"]
        assert rotations.shape == (3, 64 // 8, 8, 8)
        assert ours(x).shape == x.shape


def test_steps_run_forward_and_backward(small):
    with one_rank():
        seen = []
        for build in boft_layer.LAYERS.values():
            layer = build()
            boft_layer._step(lambda x, layer=layer: seen.append(x) or layer(x))()
        assert len(seen) == 3 and all(x.grad is not None and x.grad.abs().sum() > 0 for x in seen)
