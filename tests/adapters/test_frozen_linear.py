"""The fused function on one rank: values and gradients. test_linear.py splits it over two."""

import pytest
import torch
from torch import Tensor

from megatron_peft.adapters import frozen_linear, low_rank_linear
from megatron_peft.adapters.frozen_linear import FrozenLinearCall, producer_of, recompute, run_function
from megatron_peft.adapters.low_rank_linear import frozen_linear_plus_low_rank
from megatron_peft.adapters.rotated_linear import frozen_linear_rotated, rotates_weight
from tests.one_rank import Place

S, BATCH, IN, OUT, RANK, SCALE = 5, 2, 6, 4, 3, 1.7


def _tensor(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + sum(shape)))


def _call(with_bias: bool) -> FrozenLinearCall:
    return FrozenLinearCall(_tensor(OUT, IN), _tensor(OUT) if with_bias else None, True, False, Place(0, 1))


def _leaves() -> tuple[Tensor, Tensor, Tensor]:
    """x, A, B"""
    x, A, B = _tensor(S, BATCH, IN), _tensor(RANK, IN), _tensor(OUT, RANK)
    return x.requires_grad_(), A.requires_grad_(), B.requires_grad_()


def _mask() -> Tensor:
    return (_tensor(S, BATCH, IN, seed=1) > 0).double() / 0.5


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("mask", [None, _mask()], ids=["plain", "dropout"])
def test_forward_is_the_formula(with_bias, mask):
    x, A, B = _leaves()
    call = _call(with_bias)
    bias = call.bias if with_bias else 0.0
    branch = (x if mask is None else x * mask) @ A.T @ B.T
    expected = x @ call.weight.T + SCALE * branch + bias
    torch.testing.assert_close(frozen_linear_plus_low_rank(x, A, B, SCALE, call, mask), expected)


@pytest.mark.parametrize("mask", [None, _mask()], ids=["plain", "dropout"])
def test_gradients_are_those_of_finite_differences(mask):
    call = _call(with_bias=True)
    assert torch.autograd.gradcheck(lambda *leaves: frozen_linear_plus_low_rank(*leaves, SCALE, call, mask), _leaves())


@pytest.mark.parametrize("loss", [lambda y: y.sum(), lambda y: y.transpose(0, 2).square().sum()], ids=["expanded", "t"])
def test_gradients_that_arrive_in_another_memory_order(loss):
    leaves, call = _leaves(), _call(with_bias=False)
    x, A, B = leaves
    expected = torch.autograd.grad(loss(x @ call.weight.T + SCALE * (x @ A.T @ B.T)), leaves)
    found = torch.autograd.grad(loss(frozen_linear_plus_low_rank(*leaves, SCALE, call)), leaves)
    torch.testing.assert_close(found, expected)


def test_an_input_without_a_gradient_costs_no_product_with_the_weight(monkeypatch: pytest.MonkeyPatch):
    (x, A, B), call = _leaves(), _call(with_bias=False)
    expected = torch.autograd.grad(frozen_linear_plus_low_rank(x, A, B, SCALE, call).square().sum(), (A, B))
    y = frozen_linear_plus_low_rank(x.detach(), A, B, SCALE, call)
    monkeypatch.setattr(low_rank_linear, "start_summed_gradient", None)
    found = torch.autograd.grad(y.square().sum(), (A, B))
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_arguments_are_not_written_to():
    leaves, call = _leaves(), _call(with_bias=True)
    before = [tensor.detach().clone() for tensor in (*leaves, call.weight, call.bias)]
    y = frozen_linear_plus_low_rank(*leaves, SCALE, call)
    gradient = torch.ones_like(y)
    y.backward(gradient)
    assert all(torch.equal(*pair) for pair in zip(before, (*leaves, call.weight, call.bias), strict=True))
    assert torch.equal(gradient, torch.ones_like(y))


def test_a_caller_may_write_into_the_output():
    """As a mask of logits does; in float32 the product is oneDNN's."""
    x, weight = _tensor(S, BATCH, IN).float().requires_grad_(), _tensor(OUT, IN).float()
    y = frozen_linear.frozen_linear(x, FrozenLinearCall(weight, None, True, False, Place(0, 1)))
    y[..., 1:] = 0.0
    y.sum().backward()
    torch.testing.assert_close(x.grad, weight[0].expand_as(x))


def test_a_rotation_never_goes_into_a_bfloat16_weight():
    """R = 1 + 0.75 * 2^-8 would leave W = 1 as it is; R (W x) of x = 1.875 is nearer to the next number above x."""
    call = FrozenLinearCall(torch.eye(8).bfloat16(), None, True, False, Place(0, 1))
    x, D = torch.full((16, 1, 8), 1.875).bfloat16(), 0.75 * 2**-8 * torch.eye(4).repeat(2, 1, 1)
    assert torch.equal(frozen_linear_rotated(x, D, call), x + 2**-7)
    assert not rotates_weight(x, call.weight, D.bfloat16()) and rotates_weight(x.float(), call.weight.float(), D)


class _Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, factor):  # type: ignore[override]
        ctx.save_for_backward(x)
        ctx.factor = factor
        ctx.recompute_output = lambda ctx: ctx.factor * ctx.saved_tensors[0] ** 3
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


def test_an_output_is_recomputed_from_what_its_function_saved():
    x = torch.randn(5, requires_grad=True)
    y = run_function(_Cube, x, 5.0)
    assert torch.equal(recompute(producer_of(y)), y)
    assert producer_of(x) is None and producer_of(y + 1) is None and producer_of(y.detach()) is None
