from __future__ import annotations

import pytest
import torch

from megatron_peft.adapters.blocks import CACHED_TOKENS, add_blocks, blocks_gradient, turn_rows


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)), dtype=torch.float64)


@pytest.mark.parametrize("x", [draw(5, 2, 12), draw(12, 5).t()], ids=["contiguous", "strided"])
def test_add_blocks_is_the_block_diagonal_product(x):
    blocks = draw(3, 4, 4)
    torch.testing.assert_close(add_blocks(x, blocks), x + x @ torch.block_diag(*blocks).t())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_identity_stays_exact(dtype):
    x = draw(7, 8).to(dtype)
    assert torch.equal(add_blocks(x, torch.zeros(2, 4, 4)), x)


def test_a_change_below_the_precision_of_one_still_acts_in_bfloat16():
    """R = 1 + 0.75 * 2^-8 is 1 in bfloat16, yet R x of x = 1.875 is nearer to the next number above x."""
    x, blocks = torch.full((7, 8), 1.875).bfloat16(), 0.75 * 2**-8 * torch.eye(4).repeat(2, 1, 1)
    assert torch.equal(add_blocks(x, blocks), x + 2**-7)


def test_blocks_gradient_sums_over_tokens_by_block():
    grad, x, blocks = draw(5, 2, 12), draw(10, 12).view(5, 2, 12), draw(3, 4, 4)
    whole = grad.view(10, 12).t() @ x.view(10, 12)
    expected = torch.stack([whole[i : i + 4, i : i + 4] for i in (0, 4, 8)])
    torch.testing.assert_close(blocks_gradient(grad, x, blocks), expected)


def test_blocks_gradient_of_more_tokens_than_are_taken_at_a_time():
    grad, x, blocks = draw(CACHED_TOKENS + 44, 2, 4), draw(2 * CACHED_TOKENS + 88, 4), draw(2, 2, 2)
    whole = grad.view(-1, 4).t() @ x
    expected = torch.stack([whole[:2, :2], whole[2:, 2:]])
    torch.testing.assert_close(blocks_gradient(grad, x.view_as(grad), blocks), expected)


def test_blocks_gradient_in_bfloat16_is_rounded_once():
    grad, x = draw(3 * CACHED_TOKENS, 2).bfloat16(), draw(3, CACHED_TOKENS, 2).view(-1, 2).bfloat16()
    found = blocks_gradient(grad, x, draw(1, 2, 2).float())[0]
    torch.testing.assert_close(found.double(), grad.double().t() @ x.double(), rtol=2**-8, atol=0)


def test_turned_rows_are_those_of_the_block_diagonal_product():
    weight, blocks = draw(12, 5), draw(3, 4, 4)
    torch.testing.assert_close(turn_rows(weight, blocks), weight + torch.block_diag(*blocks) @ weight)
