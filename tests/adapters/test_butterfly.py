"""The butterfly's pieces: Cayley blocks, their composition, and the nearest orthogonal matrix."""

from __future__ import annotations

import pytest
import torch

from megatron_peft.adapters.butterfly import cayley, compose, nearest_orthogonal, skew

BLOCK, FACTORS, GROUPS = 4, 3, 2
SIZE = BLOCK * 2 ** (FACTORS - 1)


def numbers(scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (GROUPS, FACTORS, SIZE // BLOCK, BLOCK * (BLOCK - 1) // 2)
    return scale * torch.randn(shape, generator=generator, dtype=torch.float64)


def rotation(Q: torch.Tensor) -> torch.Tensor:
    return compose(cayley(skew(Q, BLOCK)))


def test_zero_is_the_identity_exactly():
    assert torch.equal(rotation(torch.zeros_like(numbers())), torch.eye(SIZE, dtype=torch.float64).expand(2, -1, -1))


def test_blocks_are_orthogonal_and_reach_every_feature():
    R = rotation(numbers())
    torch.testing.assert_close(R @ R.mT, torch.eye(SIZE, dtype=torch.float64).expand_as(R))
    assert (R.abs() > 1e-6).all()


def test_gradients():
    torch.autograd.gradcheck(rotation, numbers(0.3).requires_grad_())


@pytest.mark.parametrize("distance", [1e-3, 0.1, 0.3])
def test_the_nearest_orthogonal_matrix_is_the_polar_factor(distance):
    noise = torch.randn(500, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    P = cayley(skew(torch.ones(500, 28, dtype=torch.float64), 8)) + distance * noise
    P = P[torch.linalg.svdvals(P)[:, -1] > 0.3]
    U, _, Vh = torch.linalg.svd(P)
    assert len(P) > 100
    torch.testing.assert_close(nearest_orthogonal(P), U @ Vh, atol=1e-8, rtol=0)
    torch.testing.assert_close(nearest_orthogonal(P.float()), (U @ Vh).float(), atol=2e-6, rtol=0)
