"""The rotation by Fourier transforms is the dense one, and keeps its output alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_peft.adapters.fourier_rotation import rotate_by_fourier
from megatron_peft.adapters.unitary import as_real, change_from_start, random_theta, structured

GROUPS, SIZE, TOKENS = 3, 4, 10


@pytest.fixture
def factor() -> tuple[Tensor, Tensor, Tensor]:
    """theta, theta_0, Pi"""
    generator = torch.Generator().manual_seed(0)
    start = random_theta(GROUPS, SIZE, generator).double()
    return start + 0.3 * torch.randn(start.shape, generator=generator), start, torch.randperm(SIZE, generator=generator)


def features() -> Tensor:
    shape = (TOKENS // 2, 2, 2 * GROUPS * SIZE)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def dense(factor: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    theta, start, permutation = factor
    change = as_real(change_from_start(theta, structured(start, permutation), permutation))
    return torch.block_diag(*change) + torch.eye(2 * GROUPS * SIZE)


def test_it_is_the_dense_rotation_and_its_inverse(factor):
    x, R = features(), dense(factor)
    torch.testing.assert_close(rotate_by_fourier(x, *factor, slice(None), inverse=False), x @ R.T)
    torch.testing.assert_close(rotate_by_fourier(x, *factor, slice(None), inverse=True), x @ R)


@pytest.mark.parametrize("inverse", [False, True])
def test_gradients(factor, inverse):
    theta, *fixed = factor

    def rotated(x: Tensor, theta: Tensor) -> Tensor:
        return rotate_by_fourier(x, theta, *fixed, slice(None), inverse)

    torch.autograd.gradcheck(rotated, (features().requires_grad_(), theta.requires_grad_()))


def test_ranks_that_see_all_tokens_form_parts_of_the_gradient(factor):
    theta, *fixed = factor
    x, theta, upstream = features(), theta.requires_grad_(), features().flip(0)
    whole, *parts = (
        torch.autograd.grad((rotate_by_fourier(x, theta, *fixed, tokens, False) * upstream).sum(), theta)[0]
        for tokens in (slice(None), slice(0, 4), slice(4, TOKENS))
    )
    torch.testing.assert_close(parts[0] + parts[1], whole)
    assert parts[0].abs().max() > 1e-3


def test_it_keeps_one_output(factor):
    theta, *fixed = factor
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    x = features()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        rotate_by_fourier(x, theta.requires_grad_(), *fixed, slice(None), False)
    assert sum(kept) == x.numel() + 2 * theta.numel() + SIZE
