"""The fused layers with a rotation equal their formulas, gradients included; products with blocks on a diagonal."""

import pytest
import torch

from megatron_peft.adapters.blocks import add_blocks, blocks_gradient
from megatron_peft.adapters.boft import cayley, compose, skew
from megatron_peft.adapters.frozen_linear import FrozenLinearCall
from megatron_peft.adapters.rotated_linear import frozen_linear_rotated as rotated
from megatron_peft.adapters.rotated_linear import rotates_weight
from megatron_peft.adapters.rotation import rotate
from megatron_peft.runtime.cpu_kernels import CACHED_TOKENS
from tests.kept import kept_for_backward
from tests.one_rank import Place

IN, GROUPS, SIZE = 6, 2, 4


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def draw(*shape: int) -> torch.Tensor:
    return numbers(*shape).requires_grad_()


def changes(Q: torch.Tensor) -> torch.Tensor:
    R = compose(cayley(skew(Q)))
    return R - torch.eye(SIZE, dtype=R.dtype)


@pytest.fixture
def call() -> FrozenLinearCall:
    return FrozenLinearCall(numbers(GROUPS * SIZE, IN), numbers(GROUPS * SIZE), True, False, Place(0, 1))  # type: ignore[arg-type]


Q_SHAPE = (GROUPS, 2, 2, 1)


@pytest.mark.parametrize("num_tokens", [IN - 2, IN], ids=["activations turn", "the weight turns"])
def test_rotated_layer_is_the_formula_and_turns_no_bias(call, num_tokens):
    x, Q = draw(num_tokens // 2, 2, IN), draw(*Q_SHAPE)
    R = torch.block_diag(*compose(cayley(skew(Q))))
    torch.testing.assert_close(rotated(x, changes(Q), call), x @ (R @ call.weight).t() + call.bias)
    torch.autograd.gradcheck(lambda x, Q: rotated(x, changes(Q), call), (x, Q))


def test_rotate_forms_the_gradient_of_its_own_tokens():
    z, Q = draw(3, 2, GROUPS * SIZE), draw(*Q_SHAPE)
    torch.autograd.gradcheck(lambda z, Q: rotate(z, changes(Q)), (z, Q))
    direction = draw(3, 2, GROUPS * SIZE)
    whole, *parts = (
        torch.autograd.grad((rotate(z, changes(Q), tokens) * direction).sum(), Q)[0]
        for tokens in (slice(0, 6), slice(0, 2), slice(2, 6))
    )
    torch.testing.assert_close(parts[0] + parts[1], whole)
    assert parts[0].abs().max() > 1e-3


def test_backward_keeps_one_output_and_no_second_wide_tensor(call):
    x, D = draw(50, 2, IN), changes(draw(*Q_SHAPE)).detach().requires_grad_()
    with kept_for_backward() as kept:
        rotated(x, D, call)
    assert sum(tensor.numel() for tensor in kept) == 100 * GROUPS * SIZE + D.numel() + call.weight.numel()


def test_a_rotation_goes_into_the_weight_where_that_costs_less():
    weight, D = torch.zeros(8, IN), torch.zeros(2, 4, 4)
    few, enough = torch.zeros(IN - 1, 1, IN), torch.zeros(IN, 1, IN)
    assert rotates_weight(enough, weight, D)
    assert not rotates_weight(few, weight, D)


@pytest.mark.parametrize("x", [numbers(5, 2, 12), numbers(12, 5).t()], ids=["contiguous", "strided"])
def test_add_blocks_is_the_block_diagonal_product(x):
    blocks = numbers(3, 4, 4)
    torch.testing.assert_close(add_blocks(x, blocks), x + x @ torch.block_diag(*blocks).t())


def test_a_change_below_the_precision_of_one_still_acts_in_bfloat16():
    """R = 1 + 0.75 * 2^-8 is 1 in bfloat16, yet R x of x = 1.875 is nearer to the next number above x."""
    x, blocks = torch.full((7, 8), 1.875).bfloat16(), 0.75 * 2**-8 * torch.eye(4).repeat(2, 1, 1)
    assert torch.equal(add_blocks(x, blocks), x + 2**-7)
    assert torch.equal(add_blocks(x, 0 * blocks), x)


@pytest.mark.parametrize("num_tokens", [5, CACHED_TOKENS + 44])  # more than are taken at a time
def test_blocks_gradient_sums_over_tokens_by_block(num_tokens):
    grad, x, blocks = numbers(num_tokens, 2, 4), numbers(2 * num_tokens, 4), numbers(2, 2, 2)
    whole = grad.view(-1, 4).t() @ x
    expected = torch.stack([whole[:2, :2], whole[2:, 2:]])
    torch.testing.assert_close(blocks_gradient(grad, x.view_as(grad), blocks), expected)


def test_blocks_gradient_in_bfloat16_is_rounded_once():
    grad, x = numbers(3 * CACHED_TOKENS, 2).bfloat16(), numbers(3, CACHED_TOKENS, 2).view(-1, 2).bfloat16()
    found = blocks_gradient(grad, x, numbers(1, 2, 2).float())[0]
    torch.testing.assert_close(found.double(), grad.double().t() @ x.double(), rtol=2**-8, atol=0)
