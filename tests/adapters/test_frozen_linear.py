"""A frozen weight with a low rank or a rotation beside it, on one rank. test_many_ranks.py splits it."""

import pytest
import torch
from torch import Tensor

from megatron_peft.adapters import frozen_linear, low_rank_linear
from megatron_peft.adapters.blocks import add_blocks, blocks_gradient
from megatron_peft.adapters.boft import cayley, compose, skew
from megatron_peft.adapters.frozen_linear import FrozenLinearCall, producer_of, recompute, run_function
from megatron_peft.adapters.low_rank_linear import frozen_linear_plus_low_rank
from megatron_peft.adapters.rotated_linear import frozen_linear_rotated as rotated
from megatron_peft.adapters.rotated_linear import rotates_weight
from megatron_peft.adapters.rotation import rotate
from megatron_peft.models.layers import _SwiGLU
from megatron_peft.runtime.cpu_kernels import CACHED_TOKENS
from tests.adapters.many_ranks import given_dropout
from tests.kept import kept_for_backward
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
    dropout = given_dropout(mask)
    found = [frozen_linear_plus_low_rank(x, A, B, SCALE, one, dropout) for one in (call, _call(with_bias=False))]
    torch.testing.assert_close(found, [expected + call.bias, expected])
    formula = lambda *leaves: frozen_linear_plus_low_rank(*leaves, SCALE, call, dropout)  # noqa: E731
    assert torch.autograd.gradcheck(formula, (x, A, B), fast_mode=True)


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
    assert torch.equal(rotated(x, D, call), x + 2**-7)
    assert not rotates_weight(x, call.weight, D.bfloat16())


def test_a_rotation_goes_into_the_weight_where_that_costs_less():
    weight, D = torch.zeros(8, IN), torch.zeros(2, 4, 4)
    few, enough = torch.zeros(IN - 1, 1, IN), torch.zeros(IN, 1, IN)
    assert rotates_weight(enough, weight, D) and not rotates_weight(few, weight, D)


def test_an_output_is_recomputed_from_what_its_function_saved(monkeypatch: pytest.MonkeyPatch):
    """Where nothing is recorded, nothing of autograd's runs."""
    x = _tensor(S, IN).requires_grad_()
    y = run_function(_SwiGLU, x)
    assert torch.equal(recompute(producer_of(y)), y)
    assert producer_of(x) is None and producer_of(y + 1) is None and producer_of(y.detach()) is None
    monkeypatch.setattr(_SwiGLU, "apply", None)
    with torch.no_grad():
        assert torch.equal(run_function(_SwiGLU, x), y)


# A rotation beside it, and products with blocks on a diagonal.

GROUPS, SIZE = 2, 4
Q_SHAPE = (GROUPS, 2, 2, 1)


def changes(Q: torch.Tensor) -> torch.Tensor:
    R = compose(cayley(skew(Q)))
    return R - torch.eye(SIZE, dtype=R.dtype)


@pytest.fixture
def call() -> FrozenLinearCall:
    return FrozenLinearCall(_tensor(GROUPS * SIZE, IN), _tensor(GROUPS * SIZE), True, False, Place(0, 1))


@pytest.mark.parametrize("num_tokens", [IN - 2, IN], ids=["activations turn", "the weight turns"])
def test_rotated_layer_is_the_formula_and_turns_no_bias(call, num_tokens):
    x, Q = _tensor(num_tokens // 2, 2, IN).requires_grad_(), _tensor(*Q_SHAPE).requires_grad_()
    R = torch.block_diag(*compose(cayley(skew(Q))))
    torch.testing.assert_close(rotated(x, changes(Q), call), x @ (R @ call.weight).t() + call.bias)
    torch.autograd.gradcheck(lambda x, Q: rotated(x, changes(Q), call), (x, Q), fast_mode=True)


def test_rotate_forms_the_gradient_of_its_own_tokens():
    z, Q = _tensor(3, 2, GROUPS * SIZE).requires_grad_(), _tensor(*Q_SHAPE).requires_grad_()
    torch.autograd.gradcheck(lambda z, Q: rotate(z, changes(Q)), (z, Q), fast_mode=True)
    direction = _tensor(3, 2, GROUPS * SIZE).requires_grad_()
    whole, *parts = (
        torch.autograd.grad((rotate(z, changes(Q), tokens) * direction).sum(), Q)[0]
        for tokens in (slice(0, 6), slice(0, 2), slice(2, 6))
    )
    torch.testing.assert_close(parts[0] + parts[1], whole)
    assert parts[0].abs().max() > 1e-3


def test_backward_keeps_one_output_and_no_second_wide_tensor(call):
    x, D = _tensor(50, 2, IN).requires_grad_(), changes(_tensor(*Q_SHAPE).requires_grad_()).detach().requires_grad_()
    with kept_for_backward() as kept:
        rotated(x, D, call)
    assert sum(tensor.numel() for tensor in kept) == 100 * GROUPS * SIZE + D.numel()


@pytest.mark.parametrize("x", [_tensor(5, 2, 12), _tensor(12, 5).t()], ids=["contiguous", "strided"])
def test_add_blocks_is_the_block_diagonal_product(x):
    blocks = _tensor(3, 4, 4)
    torch.testing.assert_close(add_blocks(x, blocks), x + x @ torch.block_diag(*blocks).t())


def test_a_change_below_the_precision_of_one_still_acts_in_bfloat16():
    """R = 1 + 0.75 * 2^-8 is 1 in bfloat16, yet R x of x = 1.875 is nearer to the next number above x."""
    x, blocks = torch.full((7, 8), 1.875).bfloat16(), 0.75 * 2**-8 * torch.eye(4).repeat(2, 1, 1)
    assert torch.equal(add_blocks(x, blocks), x + 2**-7)
    assert torch.equal(add_blocks(x, 0 * blocks), x)


@pytest.mark.parametrize("num_tokens", [5, CACHED_TOKENS + 44])  # more than are taken at a time
def test_blocks_gradient_sums_over_tokens_by_block(num_tokens):
    grad, x, blocks = _tensor(num_tokens, 2, 4), _tensor(2 * num_tokens, 4), _tensor(2, 2, 2)
    whole = grad.view(-1, 4).t() @ x
    expected = torch.stack([whole[:2, :2], whole[2:, 2:]])
    torch.testing.assert_close(blocks_gradient(grad, x.view_as(grad), blocks), expected)


def test_blocks_gradient_in_bfloat16_is_rounded_once():
    grad, x = _tensor(3 * CACHED_TOKENS, 2).bfloat16(), _tensor(3, CACHED_TOKENS, 2).view(-1, 2).bfloat16()
    found = blocks_gradient(grad, x, _tensor(1, 2, 2).float())[0]
    torch.testing.assert_close(found.double(), grad.double().t() @ x.double(), rtol=2**-8, atol=0)
