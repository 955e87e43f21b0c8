"""The change dW [out, in] of a weight, a few rows at a time, so that nobody has to hold the whole of it.

    low rank        dW = B A                                     dW[rows] = B[rows] A
    rotation        dW = (R - I) W, or W (R - I)^T               R is block-diagonal: groups of rows need no others
    mixture         dW = a part of one and a part of the other   (the Hybrid)
    replacement     dW = Q - W                                   (--urnn-mode replace)

The module of a method's adapter says which with `change(tensors, peft)`. All in float64: a change is small beside W.

Letters: n rows of a block, k groups of g features.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_peft.adapters.blocks import identity_like
from megatron_peft.adapters.rotation import rotate_weight
from megatron_peft.config import Side


class StoredTensors(Mapping[str, Tensor], ABC):
    """An adapter's tensors by name; whole, or some rows of one."""

    @abstractmethod
    def rows(self, name: str, rows: slice) -> Tensor:
        """`self[name][rows]`, without reading the others."""


class WeightChange:
    """The change of one weight."""

    granule: int = 1  # rows come in blocks that begin and end at multiples of it

    def rows(self, weight: Tensor, rows: slice) -> Tensor:  # [n, in] -> [n, in]
        """dW[rows], given the base's W[rows] in float64."""
        raise NotImplementedError

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """(A [r, in], B [out, r]) with dW = B A, in float64; None if the method has no such product."""
        return None


@dataclass(frozen=True)
class LowRankChange(WeightChange):
    """B A."""

    A: Tensor
    B: Tensor

    def rows(self, weight: Tensor, rows: slice) -> Tensor:
        return self.B[rows] @ self.A

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.A, self.B


class RotationChange(WeightChange):
    """(R - I) W of the output side, W (R - I)^T of the input side."""

    def __init__(self, R: Tensor, side: Side) -> None:  # R: [k, g, g]
        self.D = R.double() - identity_like(R.double())
        self.side: Side = side
        self.granule = R.shape[-1] if side == "output" else 1

    @property
    def is_zero(self) -> bool:
        return not self.D.any()

    def rows(self, weight: Tensor, rows: slice) -> Tensor:
        groups = slice(rows.start // self.granule, rows.stop // self.granule)
        return rotate_weight(weight, self.D[groups] if self.side == "output" else self.D, self.side)


@dataclass(frozen=True)
class MixedChange(WeightChange):
    """mix B A + (1 - mix) (R - I) W. The base may have other values by now (--hybrid-merge-interval)."""

    mix: float  # lambda
    low_rank: LowRankChange
    rotation: RotationChange  # of the output side
    merged_base: Callable[[slice], Tensor] | None = None  # rows -> W[rows] with what has been merged into it

    @property
    def granule(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.rotation.granule

    def rows(self, weight: Tensor, rows: slice) -> Tensor:
        start = weight if self.merged_base is None else self.merged_base(rows).double()
        change = torch.lerp(self.rotation.rows(start, rows), self.low_rank.rows(start, rows), self.mix)
        return change + (start - weight)

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """The factors of the low-rank part, where the rotation is the identity."""
        if self.merged_base is not None or not self.rotation.is_zero:
            return None
        return self.low_rank.A, self.mix * self.low_rank.B


class ReplacementChange(WeightChange):
    """Q - W for a square W."""

    def __init__(self, Q: Tensor) -> None:  # [k, g, g], the blocks of the matrix in its place
        self.Q = Q.double()
        self.granule = Q.shape[-1]

    def rows(self, weight: Tensor, rows: slice) -> Tensor:
        groups = slice(rows.start // self.granule, rows.stop // self.granule)
        change = -weight
        change[:, rows] += torch.block_diag(*self.Q[groups])
        return change


class DifferenceChange(WeightChange):
    """W' - W, where only W' is known."""

    def __init__(self, trained: Callable[[slice], Tensor]) -> None:  # rows -> W'[rows]
        self.trained = trained

    def rows(self, weight: Tensor, rows: slice) -> Tensor:
        return self.trained(rows).double() - weight
