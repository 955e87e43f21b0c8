"""The butterfly of BOFT: an orthogonal matrix out of small orthogonal blocks (eq. (3)-(6)). Tensors in, tensors out.

    R = B_m ... B_1                                                                                 eq. (3)

R is block-diagonal in groups of g = b 2^(m-1) features. Factor i (from 0) views a group as [., 2, 2^i, b/2] and mixes
the pairs, eq. (4): its blocks act on the b features {pair} x {b/2}, at a stride of 2^i b/2. So m factors of b x b
blocks reach every feature of the group.

Letters: k groups, m factors, c = g / b blocks of a factor in a group, b block size, g features of a group.
"""

from collections.abc import Sequence
from functools import cache
from itertools import accumulate

import torch
from torch import Tensor

from megatron_peft.adapters.frozen_linear import identity_like

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
    """(I + Q)(I - Q)^-1 = 2 (I - Q)^-1 - I: orthogonal for a skew-symmetric Q, and the inverse is always there.

    The answer C is kept for backward: with N = (I - Q)^-1 = (C + I) / 2, dQ = 2 N^T dC N^T.
    """
    return _Cayley.apply(Q)


class _Cayley(torch.autograd.Function):
    @staticmethod
    def forward(ctx, Q):  # type: ignore[override]
        C = inverse(identity_like(Q) - Q).mul_(2).sub_(identity_like(Q))
        ctx.save_for_backward(C)
        return C

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        (C,) = ctx.saved_tensors
        twice_N = (C + identity_like(C)).mT
        return (twice_N @ grad @ twice_N).div_(2)


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
    """R = B_m ... B_1 as dense blocks. Keeps the factors for backward and nothing else."""
    return _Compose.apply(factors)


class _Compose(torch.autograd.Function):
    @staticmethod
    def forward(ctx, factors):  # type: ignore[override]
        ctx.save_for_backward(factors)
        return _products(_dense_factors(factors))[-1]

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        (factors,) = ctx.saved_tensors
        dense = _dense_factors(factors)
        below = _products(dense[:-1])  # of the factors under each but the first
        grad_factors = torch.empty_like(factors)
        for i in range(len(dense) - 1, 0, -1):
            grad_factors[:, i] = _entries(grad @ below[i - 1].mT, i, factors)
            grad = dense[i].mT @ grad
        grad_factors[:, 0] = _entries(grad, 0, factors)
        return grad_factors


def _products(dense: Sequence[Tensor]) -> list[Tensor]:
    """B_1, B_2 B_1, B_3 B_2 B_1, ..."""
    return list(accumulate(dense, lambda below, factor: factor @ below))


def _dense_factors(factors: Tensor) -> list[Tensor]:  # [k, m, c, b, b] -> m times [k, g, g]
    num_groups, num_factors, count, size, _ = factors.shape
    dense = [factors.new_zeros(num_groups, count * size, count * size) for _ in range(num_factors)]
    for i, matrix in enumerate(dense):
        entries = _entry_view(matrix, i, size)
        entries.copy_(factors[:, i].reshape(entries.shape))
    return dense


def _entries(dense: Tensor, i: int, factors: Tensor) -> Tensor:  # [k, g, g] -> [k, c, b, b]
    """What a dense matrix has in the places of factor i's blocks."""
    return _entry_view(dense, i, factors.shape[-1]).reshape(factors[:, i].shape)


def _entry_view(dense: Tensor, i: int, size: int) -> Tensor:  # [k, g, g] -> [k, c / 2^i, 2^i, 2, b / 2, 2, b / 2]
    """The places of factor i's blocks in a dense matrix: where both features are of the same pair (eq. (4))."""
    halves = 2 if i else 1  # the first factor's pairs are neighbours, so that b may be odd where it is the only one
    side = (dense.shape[-1] // (2**i * size), halves, 2**i, size // halves)
    same = dense.view(-1, *side, *side).diagonal(0, 1, 5).diagonal(0, 2, 5)
    return same.permute(0, 5, 6, 1, 2, 3, 4)
