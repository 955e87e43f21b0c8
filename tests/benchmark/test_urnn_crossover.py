"""The crossover's figures name both ways and compare the one in use with the other."""

from __future__ import annotations

from megatron_peft.benchmark import urnn_crossover
from megatron_peft.benchmark.urnn_crossover import crossover_figures


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
