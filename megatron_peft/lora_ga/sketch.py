"""LoRA-GA's mathematics: singular triplets of G from two sketches (eq. (7)), and A and B from them (eq. (8)).

    pass 1:  Y = G Omega          [out, w]      Q = an orthonormal basis of Y
    pass 2:  Z = Q^T G            [w, in]       G ~ Q Z, and the SVD of Z gives that of Q Z

No communication here. Ranks may share the rows of Y and the columns of Z: `all_sum` sums a narrow matrix over them (one
process passes `lambda partial: partial`).

Letters: w width of the sketch, r rank; out and in are this rank's.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

AllSum = Callable[[Tensor], Tensor]
NEGLIGIBLE = 1e-14  # eigenvalues of a Gram matrix below this share of the largest are rounding errors


class Triplets(NamedTuple):
    """The r leading singular triplets: U [out, r], S [r] from the largest, V [in, r]; float64."""

    U: Tensor
    S: Tensor
    V: Tensor


def orthonormal_basis(Y: Tensor, all_sum: AllSum) -> Tensor:  # [out, w] -> [out, w]
    """Q with orthonormal columns that span those of Y; columns beyond the rank of Y are zero."""
    # A Gram matrix squares the condition number, so this is done in float64, and twice.
    return _orthonormalize(_orthonormalize(Y.double(), all_sum), all_sum)


def _orthonormalize(Y: Tensor, all_sum: AllSum) -> Tensor:
    eigenvalues, vectors = torch.linalg.eigh(all_sum(Y.T @ Y))
    return Y @ (vectors * _inverse(eigenvalues.clamp_min(0).sqrt(), NEGLIGIBLE**0.5))


def leading_triplets(Q: Tensor, Z: Tensor, rank: int, all_sum: AllSum) -> Triplets:
    """Singular triplets of Q Z, up to the signs of the vectors. Q: [out, w], orthonormal columns; Z: [w, in]."""
    Z = Z.double()
    eigenvalues, vectors = torch.linalg.eigh(all_sum(Z @ Z.T))
    S = eigenvalues.flip(0)[:rank].clamp_min(0).sqrt()
    left = vectors.flip(1)[:, :rank]
    return Triplets(Q @ left, S, Z.T @ (left * _inverse(S, NEGLIGIBLE**0.5)))


def with_fixed_signs(triplets: Triplets, direction: Tensor, all_sum: AllSum) -> Triplets:
    """Flip the right vectors that point away from `direction` [in], so that rounding does not choose the signs."""
    signs = torch.where(all_sum(direction.double() @ triplets.V) < 0, -1.0, 1.0).double()
    return Triplets(triplets.U * signs, triplets.S, triplets.V * signs)


def squared_residual_estimate(Y: Tensor, all_sum: AllSum) -> float:  # Y: [out, w]
    """|G - Q Q^T G|_F^2, what the sketch Y = G Omega misses of G, by leaving out one column of Omega at a time.

    Omega's entries have variance 1. G omega_i is independent of the basis of the other columns, and 1 / [(Y^T Y)^-1]_ii
    is the squared norm of what that basis misses of it. The mean over i is unbiased for w - 1 columns, so slightly too
    large for w.
    """
    Y = Y.double()
    eigenvalues, vectors = torch.linalg.eigh(all_sum(Y.T @ Y))
    floor = (NEGLIGIBLE * eigenvalues.max()).clamp_min(torch.finfo(eigenvalues.dtype).tiny)
    inverse_diagonal = (vectors.square() / eigenvalues.clamp_min(floor)).sum(1)
    return float(inverse_diagonal.reciprocal().mean())


def _inverse(values: Tensor, negligible: float) -> Tensor:
    """1 / values, 0 for those below `negligible` times the largest."""
    return torch.where(values > negligible * values.max(), 1 / values, 0.0)


# A and B from the leading singular triplets of G = U S V^T.
#
#     aligned    A = V_r^T / sqrt(3)     B = 0
#     paper      A = S^1/2 V_r^T         B = U_r S^1/2       eq. (8); the paper's A is our B, and its B our A
#     original   A = c V_r^T             B = c U_{r+1..2r}   as published: c = out^(1/4) / sqrt(gamma), gamma = 16
#
# With the last two, B A is not 0: `LowRank` subtracts a frozen copy of it.

ALIGNED_NORM = 3**-0.5  # of a row of A: that of LoRA's Kaiming-uniform start
GAMMA = 16.0


class Factors(NamedTuple):
    """A [r, in], B [out, r]."""

    A: Tensor
    B: Tensor


def aligned(triplets: Triplets, rank: int, out_features: int) -> Factors:
    """A = V_r^T / sqrt(3), B = 0. `triplets` may be more than `rank`; `out_features` is the whole layer's."""
    return Factors(ALIGNED_NORM * triplets.V[:, :rank].T, torch.zeros_like(triplets.U[:, :rank]))


def paper(triplets: Triplets, rank: int, out_features: int) -> Factors:
    """Eq. (8): A = S^1/2 V_r^T, B = U_r S^1/2."""
    root = triplets.S[:rank].sqrt()
    return Factors((triplets.V[:, :rank] * root).T, triplets.U[:, :rank] * root)


def original(triplets: Triplets, rank: int, out_features: int) -> Factors:
    """A = c V_r^T, B = c U_{r+1..2r}: the first steps of A and B together are the best change of rank 2r."""
    c = out_features**0.25 / GAMMA**0.5
    return Factors(c * triplets.V[:, :rank].T, c * triplets.U[:, rank : 2 * rank])


def with_all_rows(factors: Factors, S: Tensor, own: Tensor) -> Factors:
    """A with LoRA's own rows where G has no further direction (fewer tokens than r): where a row of A and the column of
    B are both zero, neither would ever get a gradient.

    S: [r] singular values; those that are rounding errors have zero vectors (`leading_triplets`).
    own: [r, in], LoRA's initial A.
    """
    has_direction = S > NEGLIGIBLE**0.5 * S.max()
    return factors._replace(A=torch.where(has_direction[:, None], factors.A, own.to(factors.A)))


class InitRule(NamedTuple):
    """How A and B follow from singular triplets, of which each of the r needs so many."""

    triplets_per_rank: int
    factors: Callable[[Triplets, int, int], Factors]  # (triplets, r, out_features of the whole layer) -> A and B


# --lora-ga-init
INIT_RULES = {"aligned": InitRule(1, aligned), "paper": InitRule(1, paper), "original": InitRule(2, original)}
