"""The layers that are timed compute what they are said to; the crossover names both ways, the one in use first."""

from __future__ import annotations

import pytest
import torch

from megatron_peft.benchmark import boft_layer, urnn_crossover
from megatron_peft.benchmark.urnn_crossover import crossover_figures
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


def test_the_way_in_use_stands_first(monkeypatch):
    monkeypatch.setattr(urnn_crossover, "NUM_TOKENS", 8)
    monkeypatch.setattr(urnn_crossover, "NUM_FEATURES", 64)
    monkeypatch.setattr(urnn_crossover, "DENSE_UP_TO", 16)
    figures = crossover_figures(num_turns=1)
    assert [figure.name for figure in figures] == [
        "groups of 4: dense / fourier",
        "groups of 16: dense / fourier",
        "groups of 32: fourier / dense",
        "groups of 64: fourier / dense",
    ]
    assert all(figure.measured > 0 and figure.target == 1.0 for figure in figures)
