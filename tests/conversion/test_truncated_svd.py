"""The rank and the error of a sketch are those of the whole matrix's singular values, and nobody holds the matrix."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_peft.conversion.lora_approximation import truncated_svd
from tests.kept import NewTensors

OUT, IN = 256, 192


@dataclass(frozen=True)
class Held:
    """A matrix in memory, in blocks of 48 rows."""

    whole: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return tuple(self.whole.shape)

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        for start in range(0, len(self.whole), 48):
            rows = slice(start, min(start + 48, len(self.whole)))
            yield rows, self.whole[rows]


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(shape[0]))


def with_singular_values(values: Tensor) -> Tensor:
    left, right = (torch.linalg.qr(random(size, IN)).Q for size in (OUT, IN))
    return left * values @ right.T


def rotation_of_noise() -> Tensor:
    """(R - I) W: singular values that hardly fall, the worst for a sketch."""
    Q = 0.05 * random(OUT // 8, 8, 8)
    R = torch.linalg.matrix_exp(Q - Q.mT) - torch.eye(8)
    return torch.bmm(R, random(OUT, IN).view(OUT // 8, 8, IN)).view(OUT, IN)


NUMBERS = torch.arange(1, IN + 1, dtype=torch.float64)
CASES = {
    "exponential": with_singular_values(torch.exp(-NUMBERS / 15)),
    "power law": with_singular_values(1 / NUMBERS),
    "flat": rotation_of_noise(),
    "low rank and noise": random(OUT, 20) @ random(20, IN) + 0.05 * random(OUT + 1, IN)[1:],
    "exactly low rank": random(OUT, 7) @ random(7, IN),
}


def found(matrix: Tensor, tolerance: float = 0.05, max_rank: int = 64):
    return truncated_svd(Held(matrix), tolerance, max_rank, torch.Generator().manual_seed(0))


def discarded(matrix: Tensor) -> np.ndarray:
    """Relative Frobenius norm of what ranks 0, 1, ... leave out, by numpy's SVD of the whole."""
    squared = np.linalg.svd(matrix.numpy(), compute_uv=False) ** 2
    return np.sqrt(np.append(np.cumsum(squared[::-1])[::-1], 0) / squared.sum())


@pytest.mark.parametrize("tolerance", [0.3, 0.05, 1e-3])
@pytest.mark.parametrize("name", CASES)
def test_rank_is_the_smallest_and_the_error_that_of_the_discarded_singular_values(name, tolerance):
    matrix = CASES[name]
    left_out, truncation = discarded(matrix), found(matrix, tolerance)
    smallest = int((left_out <= tolerance).argmax())
    assert truncation.rank == min(smallest, 64)
    assert left_out[truncation.rank] <= truncation.residual + 1e-7
    assert truncation.residual <= 1.01 * left_out[truncation.rank] + 1e-7


@pytest.mark.parametrize("name", CASES)
def test_the_error_that_is_told_is_that_of_the_factors(name):
    matrix, truncation = CASES[name], found(CASES[name], 0.1)
    measured = torch.linalg.norm(matrix - truncation.B @ truncation.A) / torch.linalg.norm(matrix)
    assert truncation.residual == pytest.approx(measured.item(), rel=1e-6, abs=1e-7)
    assert truncation.squared_norm == pytest.approx(matrix.square().sum().item(), rel=1e-12)


def test_tolerance_zero_ends_at_the_rank_of_the_matrix():
    truncation = found(CASES["exactly low rank"], tolerance=0)
    assert truncation.rank == 7 and truncation.residual < 1e-7


def test_no_change_has_rank_zero():
    truncation = found(torch.zeros(OUT, IN, dtype=torch.float64))
    assert truncation.rank == 0 and truncation.residual == 0
    assert truncation.A.shape == (0, IN) and truncation.B.shape == (OUT, 0)


def test_a_matrix_smaller_than_the_sketch_is_exact():
    matrix = CASES["flat"][:40]
    assert found(matrix).residual <= 0.05
    assert found(matrix, tolerance=0).residual < 1e-7


def test_no_tensor_is_as_large_as_the_matrix():
    for name in ("flat", "exponential"):
        matrix = CASES[name]
        with NewTensors() as made:
            found(matrix, max_rank=32)
        assert OUT * 48 <= made.largest < OUT * IN / 3  # the sketch is 48 wide
