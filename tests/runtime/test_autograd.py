"""A function gives the same with and without a graph, and makes none where nothing is recorded."""

from __future__ import annotations

import pytest
import torch

from megatron_peft.runtime.autograd import run_function


class _Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, factor):  # type: ignore[override]
        ctx.save_for_backward(x)
        ctx.factor = factor
        return factor * x**3

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return 3 * ctx.factor * x**2 * grad, None


def test_gradients_are_those_of_the_function():
    x = torch.tensor(2.0, requires_grad=True)
    run_function(_Cube, x, 5.0).backward()
    assert x.grad == 60.0


def test_forward_alone_where_nothing_is_recorded(monkeypatch: pytest.MonkeyPatch):
    x = torch.tensor(2.0, requires_grad=True)
    monkeypatch.setattr(_Cube, "apply", None)
    with torch.no_grad():
        assert run_function(_Cube, x, 5.0) == 40.0
