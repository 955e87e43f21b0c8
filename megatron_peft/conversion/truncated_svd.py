"""The leading singular triplets of a matrix that is read a few rows at a time, and exactly what they leave out.

A small matrix is taken whole (`svd_of_whole`). For others it is a sketch with subspace iteration: with X [in, w]
orthonormal, one pass over the rows gives

    T = M X  [out, w]        Z = M^T T  [in, w]        |M|_F^2

and the next X is an orthonormal basis of Z. The singular values s_i of T approach those of M from below. With T =
U S V^T and its k leading triplets, U_k S_k (X V_k)^T is a projection of M, so what it leaves out is exactly

    |M - U_k S_k (X V_k)^T|_F^2 = |M|_F^2 - (s_1^2 + ... + s_k^2)

however far the iteration has come. The width w grows until the smallest k within the tolerance lies well inside it.
Everything is in float64, since the difference of two squared norms may be small.

Letters: w width of the sketch, k rank, n rows of a block.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

FIRST_RANK = 32  # that the sketch is wide enough for at first
EXTRA = 16  # columns beyond the rank: the last directions of a sketch are the worst
FEWEST_PASSES = 3  # over the rows, at each width: a random start and two steps of the iteration
MOST_PASSES = 10
PASSES_TO_WIDEN = 2  # after which a sketch may be found too narrow
GROWTH = 4  # of the width
SETTLED = 0.005  # relative change of the squared residual from one pass to the next
ROUNDING = 1e-14  # relative to the squared norm


class RowBlocks(Protocol):
    """A matrix [out, in] that can be read again and again."""

    @property
    def shape(self) -> tuple[int, int]: ...

    def blocks(self) -> Iterable[tuple[slice, Tensor]]:
        """Every row once: which ones, and their values [n, in] in float64."""
        ...


@dataclass(frozen=True)
class Truncation:
    """M ~ B A.

    Args:
        A: [k, in], float64.
        B: [out, k], float64.
        squared_norm: |M|_F^2.
        squared_residual: |M - B A|_F^2.
    """

    A: Tensor
    B: Tensor
    squared_norm: float
    squared_residual: float

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @property
    def residual(self) -> float:
        """|M - B A|_F / |M|_F; 0 for M = 0."""
        return (self.squared_residual / self.squared_norm) ** 0.5 if self.squared_norm else 0.0


@dataclass(frozen=True)
class _Sketch:
    """X [in, w], T = M X, Z = M^T T, |M|_F^2, and the squared residuals of ranks 0, 1, ..., w."""

    X: Tensor
    T: Tensor
    Z: Tensor
    squared_norm: float
    squared_residuals: Tensor

    @classmethod
    def of(cls, matrix: RowBlocks, start: Tensor) -> "_Sketch":
        """One pass over the rows."""
        X = torch.linalg.qr(start).Q
        T, Z = X.new_zeros(matrix.shape[0], X.shape[1]), torch.zeros_like(X)
        squared_norm = 0.0
        for rows, block in matrix.blocks():
            T[rows] = block @ X
            Z.addmm_(block.T, T[rows])
            squared_norm += block.square().sum().item()
        squared_values = torch.linalg.eigvalsh(T.T @ T)  # much cheaper than the singular values of T
        return cls(X, T, Z, squared_norm, _squared_residuals(squared_norm, squared_values))

    def truncated(self, rank: int) -> Truncation:
        """The k leading triplets, their roots on either side."""
        _, S, Vh = torch.linalg.svd(self.T, full_matrices=False)
        leading, root = Vh[:rank].T, S[:rank].sqrt()
        A = (self.X @ (leading * root)).T
        return Truncation(A, self.T @ (leading / root), self.squared_norm, float(self.squared_residuals[rank]))


def truncated_svd(matrix: RowBlocks, tolerance: float, max_rank: int, generator: torch.Generator) -> Truncation:
    """The smallest rank whose relative Frobenius error is at most `tolerance`, up to `max_rank`.

    Args:
        matrix: M; it is read several times.
        tolerance: of |M - B A|_F / |M|_F.
        max_rank: the rank where no smaller one suffices.
        generator: of the random start, on the CPU.
    """
    side = min(matrix.shape)
    widest = min(side, max_rank + EXTRA)
    width = min(widest, FIRST_RANK + EXTRA)

    def random(num_columns: int) -> Tensor:
        return torch.randn(matrix.shape[1], num_columns, dtype=torch.float64, generator=generator)

    start = random(width)
    while True:
        most = max_rank if width == widest else width - EXTRA  # a rank beyond it needs a wider sketch
        sketch, rank = _iterated(matrix, start, tolerance, max_rank, most)
        if rank <= most:
            return sketch.truncated(rank)
        width = min(widest, GROWTH * width)
        start = torch.cat([sketch.Z, random(width - sketch.Z.shape[1])], dim=1)


def svd_of_whole(matrix: RowBlocks, tolerance: float, max_rank: int) -> Truncation:
    """The same of a matrix that is small enough to hold, in one reading: by the Gram matrix of its short side."""
    whole = torch.empty(matrix.shape, dtype=torch.float64)
    for rows, block in matrix.blocks():
        whole[rows] = block
    is_tall = whole.shape[0] >= whole.shape[1]
    tall = whole if is_tall else whole.T
    squared_values, vectors = torch.linalg.eigh(tall.T @ tall)
    squared_norm = whole.square().sum().item()
    residuals = _squared_residuals(squared_norm, squared_values)
    rank = _smallest_rank(residuals, squared_norm, tolerance, max_rank)
    leading = vectors.flip(1)[:, :rank]
    long = tall @ leading
    root = long.norm(dim=0).sqrt()
    short, long = leading * root, long / root
    A, B = (short.T, long) if is_tall else (long.T, short)
    return Truncation(A, B, squared_norm, float(residuals[rank]))


def _squared_residuals(squared_norm: float, squared_values: Tensor) -> Tensor:
    """Of ranks 0, 1, ..., from the squares of the singular values, the smallest first."""
    kept = squared_values.flip(0).cumsum(0)
    return (squared_norm - torch.cat([kept.new_zeros(1), kept])).clamp_min(0)


def _smallest_rank(squared_residuals: Tensor, squared_norm: float, tolerance: float, max_rank: int) -> int:
    """The rank that suffices; `max_rank`, or the largest there is, if none does."""
    enough = squared_residuals <= max(tolerance**2, ROUNDING) * squared_norm
    first = int(enough.int().argmax()) if bool(enough.any()) else len(enough) - 1
    return min(first, max_rank)


def _iterated(matrix: RowBlocks, start: Tensor, tolerance: float, max_rank: int, most: int) -> tuple[_Sketch, int]:
    """The sketch whose residual no longer changes, and its rank; an earlier one if its rank is above `most`."""
    before, number = (0, 0.0), 0
    while True:
        sketch, number = _Sketch.of(matrix, start), number + 1
        rank = _smallest_rank(sketch.squared_residuals, sketch.squared_norm, tolerance, max_rank)
        now = rank, float(sketch.squared_residuals[rank])
        settled = now[0] == before[0] and abs(now[1] - before[1]) <= max(
            SETTLED * now[1], ROUNDING * sketch.squared_norm
        )
        too_narrow = rank > most and number >= PASSES_TO_WIDEN
        if too_narrow or number == MOST_PASSES or (settled and number >= FEWEST_PASSES):
            return sketch, rank
        before, start = now, sketch.Z
