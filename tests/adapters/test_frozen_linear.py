"""A frozen weight with a low rank beside it, on one rank: values and gradients. test_many_ranks.py splits it."""

import pytest
import torch
from torch import Tensor

from megatron_peft.adapters import frozen_linear, low_rank_linear
from megatron_peft.adapters.frozen_linear import FrozenLinearCall, producer_of, recompute, run_function
from megatron_peft.adapters.low_rank_linear import frozen_linear_plus_low_rank
from megatron_peft.adapters.rotated_linear import frozen_linear_rotated, rotates_weight
from megatron_peft.models.layers import _SwiGLU
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


@pytest.mark.parametrize("mask", [None, (_tensor(S, BATCH, IN, seed=1) > 0) / 0.5], ids=["plain", "dropout"])
def test_it_is_the_formula_and_gradients_are_those_of_finite_differences(mask):
    (x, A, B), call = _leaves(), _call(with_bias=True)
    expected = x @ call.weight.T + SCALE * (x if mask is None else x * mask) @ A.T @ B.T
    found = [frozen_linear_plus_low_rank(x, A, B, SCALE, one, mask) for one in (call, _call(with_bias=False))]
    torch.testing.assert_close(found, [expected + call.bias, expected])
    assert torch.autograd.gradcheck(lambda *leaves: frozen_linear_plus_low_rank(*leaves, SCALE, call, mask), (x, A, B))


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


def test_an_output_is_recomputed_from_what_its_function_saved(monkeypatch: pytest.MonkeyPatch):
    """Where nothing is recorded, nothing of autograd's runs."""
    x = _tensor(S, IN).requires_grad_()
    y = run_function(_SwiGLU, x)
    assert torch.equal(recompute(producer_of(y)), y)
    assert producer_of(x) is None and producer_of(y + 1) is None and producer_of(y.detach()) is None
    monkeypatch.setattr(_SwiGLU, "apply", None)
    with torch.no_grad():
        assert torch.equal(run_function(_SwiGLU, x), y)
