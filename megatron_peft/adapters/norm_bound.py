"""Eq. (2): ||dW||_F <= X ||W0||_F for a low-rank change dW = s B A, kept by scaling its factors.

dW is never formed. |B A|^2 is the sum of the products of the entries of two small Gram matrices, B^T B and A A^T, and
a Gram matrix over a side that is split over ranks is the sum of theirs.

Without a subtracted start B alone is scaled, by t = limit / |B A|. With one, dW / s = B A - B0 A0, and scaling A - A0
and B - B0 by t gives t P + t^2 Q with

    P = (B - B0) A0 + B0 (A - A0)        Q = (B - B0)(A - A0)

whose norm is at most t |P| + t^2 |Q|, which is the limit at t = 2 limit / (|P| + sqrt(|P|^2 + 4 limit |Q|)). Both are
one formula: without a start P = B A and Q = 0. Nothing is scaled where |P + Q| is within the limit. No look by the
host, no communication here.

Letters: r rank, w = r, or 2r with a subtracted start.
"""

import torch
from torch import Tensor

from megatron_peft.adapters.low_rank import LowRank


def gram_matrices(low_rank: LowRank) -> tuple[Tensor, Tensor]:
    """(L^T L, R R^T), [w, w] in float64, of this rank's L = [B - B0, B0] and R = [A0; A - A0] with P = L R.

    Without a subtracted start L = B and R = A.
    """
    A, B = low_rank.A.detach().double(), low_rank.B.detach().double()
    if low_rank.A0 is not None and low_rank.B0 is not None:
        A = torch.cat([low_rank.A0.double(), A - low_rank.A0])
        B = torch.cat([B - low_rank.B0, low_rank.B0.double()], dim=1)
    return B.T @ B, A @ A.T


def shrinkage(left: Tensor, right: Tensor, limits: Tensor, subtracts_start: bool) -> Tensor:
    """t for each layer: 1 where the change is within its limit.

    Args:
        left, right: [layers, w, w], complete Gram matrices.
        limits: [layers], of |dW| / s.
        subtracts_start: w is 2r.
    """
    P = _norm(left, right)
    if not subtracts_start:
        return _within(P, limits, P, torch.zeros_like(P))
    r = left.shape[-1] // 2
    both = right.clone()  # of [A0 + (A - A0); A - A0], for P + Q = L times that
    both[:, :r] += right[:, r:]
    both[:, :, :r] += both[:, :, r:].clone()
    Q = _norm(left[:, :r, :r], right[:, r:, r:])
    return _within(_norm(left, both), limits, P, Q)


def _within(norm: Tensor, limits: Tensor, P: Tensor, Q: Tensor) -> Tensor:
    root = 2 * limits / (P + (P.square() + 4 * limits * Q).sqrt())
    return torch.where(norm > limits, root, 1.0)


def _norm(left: Tensor, right: Tensor) -> Tensor:
    """|L R|_F out of L^T L and R R^T, [layers]."""
    return (left * right).sum((-2, -1)).clamp_min(0).sqrt()


@torch.no_grad()
def shrink(factor: Tensor, start: Tensor | None, t: Tensor) -> None:
    """factor <- start + t (factor - start) in place; start None stands for zero. t is a scalar tensor."""
    if start is None:
        factor.mul_(t)
    else:
        factor.copy_(torch.lerp(start.to(factor), factor, t.to(factor)))  # exact at t = 1
