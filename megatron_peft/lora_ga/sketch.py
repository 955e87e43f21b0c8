"""Leading singular triplets of a matrix G that is never formed, out of two sketches of it (eq. (7)).

    pass 1:  Y = G Omega          [out, w]      Q = an orthonormal basis of Y
    pass 2:  Z = Q^T G            [w, in]       G ~ Q Z, and the SVD of the small Z gives that of Q Z

Y may be split by rows, Z by columns: each function takes `add_up`, the sum over the holders of the parts, and only
narrow matrices pass through it. Orthonormalising by a Gram matrix squares the condition number, so it is done in
float64, and twice. No communication here: one process passes `lambda part: part`.

Letters: w width of the sketch, r rank; out and in are what this holder has of them.
"""

from collections.abc import Callable
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
