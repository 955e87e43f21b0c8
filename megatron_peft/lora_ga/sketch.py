"""LoRA-GA's mathematics: leading singular triplets of a G that is never formed, out of two sketches (eq. (7)).

    pass 1:  Y = G Omega          [out, w]      Q = an orthonormal basis of Y
    pass 2:  Z = Q^T G            [w, in]       G ~ Q Z, and the SVD of the small Z gives that of Q Z

Y may be split by rows, Z by columns: each function takes `add_up`, the sum over the holders of the parts, and only
narrow matrices pass through it. Orthonormalising by a Gram matrix squares the condition number, so it is done in
float64, and twice. No communication here: one process passes `lambda part: part`.

Letters: w width of the sketch, r rank; out and in are what this holder has of them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

AddUp = Callable[[Tensor], Tensor]
NEGLIGIBLE = 1e-14  # eigenvalues of a Gram matrix below this part of the largest are rounding


class Triplets(NamedTuple):
    """The r leading singular triplets: U [out, r], S [r] from the largest, V [in, r]; float64."""

    U: Tensor
    S: Tensor
    V: Tensor


def orthonormal_basis(Y: Tensor, add_up: AddUp) -> Tensor:  # [out, w] -> [out, w]
    """Q with orthonormal columns that span those of Y; columns beyond the rank of Y are zero."""
    return _orthonormalise(_orthonormalise(Y.double(), add_up), add_up)


def _orthonormalise(Y: Tensor, add_up: AddUp) -> Tensor:
    eigenvalues, vectors = torch.linalg.eigh(add_up(Y.T @ Y))
    return Y @ (vectors * _inverse(eigenvalues.clamp_min(0).sqrt(), NEGLIGIBLE**0.5))


def leading_triplets(Q: Tensor, Z: Tensor, rank: int, add_up: AddUp) -> Triplets:
    """Singular triplets of Q Z, up to the signs of the vectors.

    Args:
        Q: [out, w], orthonormal columns.
        Z: [w, in].
        rank: r, at most w.
        add_up: the sum over the holders of Z's columns.
    """
    Z = Z.double()
    eigenvalues, vectors = torch.linalg.eigh(add_up(Z @ Z.T))
    S = eigenvalues.flip(0)[:rank].clamp_min(0).sqrt()
    left = vectors.flip(1)[:, :rank]
    return Triplets(Q @ left, S, Z.T @ (left * _inverse(S, NEGLIGIBLE**0.5)))


def with_fixed_signs(triplets: Triplets, direction: Tensor, add_up: AddUp) -> Triplets:
    """Each right vector turned towards `direction` [in], so that rounding does not choose between v and -v."""
    signs = torch.where(add_up(direction.double() @ triplets.V) < 0, -1.0, 1.0).double()
    return Triplets(triplets.U * signs, triplets.S, triplets.V * signs)


def squared_residual_estimate(Y: Tensor, variance: float, add_up: AddUp) -> float:
    """|G - Q Q^T G|_F^2, what the sketch Y = G Omega leaves of G, by leaving out one column of Omega at a time.

    G omega_i is independent of the basis of the other columns, and the square of what that basis leaves of it is
    1 / [(Y^T Y)^-1]_ii. The mean over i is that of w - 1 columns without bias, so a little too large for w.

    Args:
        Y: [out, w].
        variance: of Omega's independent entries.
        add_up: the sum over the holders of Y's rows.
    """
    Y = Y.double()
    eigenvalues, vectors = torch.linalg.eigh(add_up(Y.T @ Y))
    floor = (NEGLIGIBLE * eigenvalues.max()).clamp_min(torch.finfo(eigenvalues.dtype).tiny)
    inverse_diagonal = (vectors.square() / eigenvalues.clamp_min(floor)).sum(1)
    return float(inverse_diagonal.reciprocal().mean()) / variance


def _inverse(values: Tensor, negligible: float) -> Tensor:
    """1 / values, 0 for those below `negligible` times the largest."""
    return torch.where(values > negligible * values.max(), 1 / values, 0.0)


# What A and B start as, out of the leading singular triplets of the gradient G = U S V^T (eq. (7)-(8)).
#
#     aligned    A = V_r^T / sqrt(3)     B = 0               the pretrained function, A with LoRA's own norm
#     paper      A = S^1/2 V_r^T         B = U_r S^1/2       eq. (8); the paper's A is our B, its B our A
#     original   A = c V_r^T             B = c U_{r+1..2r}   as published: c = out^(1/4) / sqrt(gamma), gamma = 16
#
# The last two are no function-preserving starts by themselves: `LowRank` subtracts a frozen copy of them.
#
# Letters: r rank, w number of triplets; out and in are what this holder has of them. No communication here.

ALIGNED_NORM = 3**-0.5  # of a row of A: that of LoRA's Kaiming-uniform start
GAMMA = 16.0


class Factors(NamedTuple):
    """A [r, in], B [out, r]."""

    A: Tensor
    B: Tensor


def aligned(triplets: Triplets, rank: int, out_features: int) -> Factors:
    """A = V_r^T / sqrt(3), B = 0."""
    return Factors(ALIGNED_NORM * triplets.V[:, :rank].T, torch.zeros_like(triplets.U[:, :rank]))


def paper(triplets: Triplets, rank: int, out_features: int) -> Factors:
    """Eq. (8): A = S^1/2 V_r^T, B = U_r S^1/2."""
    root = triplets.S[:rank].sqrt()
    return Factors((triplets.V[:, :rank] * root).T, triplets.U[:, :rank] * root)


def original(triplets: Triplets, rank: int, out_features: int) -> Factors:
    """A = c V_r^T, B = c U_{r+1..2r}, so that the first steps of A and B add up to the best change of rank 2r."""
    c = out_features**0.25 / GAMMA**0.5
    return Factors(c * triplets.V[:, :rank].T, c * triplets.U[:, rank : 2 * rank])


def with_all_rows(factors: Factors, S: Tensor, own: Tensor) -> Factors:
    """A with LoRA's own rows where the gradient has no direction left (fewer tokens than r): a row of zeros beside a
    column of zeros of B would get no gradient, ever.

    Args:
        S: [r] singular values; those that are rounding have no vectors (`leading_triplets`).
        own: [r, in], the A that LoRA starts with.
    """
    has_direction = S > NEGLIGIBLE**0.5 * S.max()
    return factors._replace(A=torch.where(has_direction[:, None], factors.A, own.to(factors.A)))


@dataclass(frozen=True)
class Start:
    """One of the starts.

    Args:
        triplets_a_rank: how many singular triplets it takes for each of the r.
        factors: (w triplets, r, whole out) -> A and B.
    """

    triplets_a_rank: int
    factors: Callable[[Triplets, int, int], Factors]


# --lora-ga-init
STARTS = {"aligned": Start(1, aligned), "paper": Start(1, paper), "original": Start(2, original)}
