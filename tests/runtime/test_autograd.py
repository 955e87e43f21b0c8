"""A function makes no graph where nothing is recorded, and its output again of what it keeps."""

import pytest
import torch

from megatron_peft.runtime.autograd import made_again, maker_of, run_function


class _Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, factor):  # type: ignore[override]
        ctx.save_for_backward(x)
        ctx.factor = factor
        ctx.make_again = lambda ctx: ctx.factor * ctx.saved_tensors[0] ** 3
        return factor * x**3

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return 3 * ctx.factor * x**2 * grad, None


def test_forward_alone_where_nothing_is_recorded(monkeypatch: pytest.MonkeyPatch):
    x = torch.tensor(2.0, requires_grad=True)
    monkeypatch.setattr(_Cube, "apply", None)
    with torch.no_grad():
        assert run_function(_Cube, x, 5.0) == 40.0


def test_an_output_is_made_again_of_what_its_function_keeps():
    x = torch.randn(5, requires_grad=True)
    y = run_function(_Cube, x, 5.0)
    assert torch.equal(made_again(maker_of(y)), y)
    assert maker_of(x) is None and maker_of(y + 1) is None and maker_of(y.detach()) is None
