"""What A and B start as, out of the leading singular triplets of the gradient G = U S V^T (eq. (7)-(8)).

    aligned    A = V_r^T / sqrt(3)     B = 0               the pretrained function, A with the norm of LoRA's own start
    paper      A = S^1/2 V_r^T         B = U_r S^1/2       eq. (8); the paper's A is our B, its B our A
    original   A = c V_r^T             B = c U_{r+1..2r}   as published: c = out^(1/4) / sqrt(gamma), gamma = 16

The last two are no function-preserving starts by themselves: `LowRank` subtracts a frozen copy of them.

Letters: r rank, w number of triplets; out and in are what this holder has of them. No communication here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_peft.lora_ga.sketch import NEGLIGIBLE, Triplets

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
