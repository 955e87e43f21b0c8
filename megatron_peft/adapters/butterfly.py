"""The butterfly of BOFT: an orthogonal matrix out of small orthogonal blocks (eq. (3)-(6)). Tensors in, tensors out.

    R = B_m ... B_1                                                                                 eq. (3)

R is block-diagonal in groups of g = b 2^(m-1) features. Factor i (from 0) views a group as [., 2, 2^i, b/2] and mixes
the pairs, eq. (4): its blocks act on the b features {pair} x {b/2}, at a stride of 2^i b/2. So m factors of b x b
blocks reach every feature of the group.

Letters: k groups, m factors, c = g / b blocks of a factor in a group, b block size, g features of a group.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

NUM_NEWTON_STEPS = 5


def skew(upper: Tensor, size: int) -> Tensor:  # [..., b (b - 1) / 2] -> [..., b, b]
    """The skew-symmetric matrix with these numbers above its diagonal, row by row.

    One product with a constant of zeros and ones, exact, since indexing costs several times as much both ways.
    """
    return (upper @ _skew_basis(size, upper.dtype, upper.device)).unflatten(-1, (size, size))


@cache
def _skew_basis(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:  # -> [b (b - 1) / 2, b b]
    row, column = torch.triu_indices(size, size, 1, device=device)
    basis = torch.zeros(len(row), size, size, dtype=dtype, device=device)
    number = torch.arange(len(row), device=device)
    basis[number, row, column] = 1
    basis[number, column, row] = -1
    return basis.flatten(1)


def cayley(Q: Tensor) -> Tensor:  # [..., b, b] -> [..., b, b]
    """(I + Q)(I - Q)^-1 = 2 (I - Q)^-1 - I: orthogonal for a skew-symmetric Q, and the inverse is always there."""
    identity = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
    return 2 * inverse(identity - Q) - identity


def nearest_orthogonal(P: Tensor) -> Tensor:  # [..., b, b] -> [..., b, b]
    """The orthogonal factor of P's polar decomposition, the projection of eq. (6).

    Newton's iteration P <- (P + P^-T) / 2 takes singular values to 1 from anywhere above 0, quadratically; one step of
    Newton-Schulz polishes. Five steps take singular values in [0.3, 3.5] to rounding; a step of training leaves them
    within a few per cent of 1. A fixed number: the device is never waited for.
    """
    for _ in range(NUM_NEWTON_STEPS):
        P = (P + inverse(P).mT) / 2
    return 1.5 * P - 0.5 * P @ (P.mT @ P)


def inverse(matrices: Tensor) -> Tensor:  # [..., b, b] -> [..., b, b]
    """Of invertible matrices, unchecked: the check of `torch.linalg.inv` has the host wait for a CUDA device."""
    return torch.linalg.inv_ex(matrices).inverse


def compose(factors: Tensor) -> Tensor:  # [k, m, c, b, b] -> [k, g, g]
    """R = B_m ... B_1 as dense blocks."""
    num_groups, num_factors, count, size, _ = factors.shape
    group_size = count * size
    identity = torch.eye(count, dtype=factors.dtype, device=factors.device)
    # The first factor's pairs are neighbours: it is block-diagonal as it stands.
    R = (factors[:, 0, :, :, None] * identity[:, None, :, None]).reshape(num_groups, group_size, group_size)
    for i in range(1, num_factors):
        pairs = (num_groups, -1, 2, 2**i, size // 2, group_size)
        rows = R.reshape(pairs).transpose(2, 3).reshape(num_groups, count, size, group_size)
        mixed = factors[:, i] @ rows
        R = mixed.reshape(num_groups, -1, 2**i, 2, size // 2, group_size).transpose(2, 3).reshape(R.shape)
    return R
