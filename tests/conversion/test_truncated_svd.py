"""The rank and the error of a sketch are those of the whole matrix's singular values."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_peft.conversion.lora_approximation import truncated_svd

OUT, IN = 256, 192


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(shape[0]))


NUMBERS = torch.arange(1, IN + 1, dtype=torch.float64)
LEFT, RIGHT = (torch.linalg.qr(random(size, IN)).Q for size in (OUT, IN))
Q = 0.05 * random(OUT // 8, 8, 8)
D = torch.linalg.matrix_exp(Q - Q.mT) - torch.eye(8)  # of a rotation of noise
CASES = {
    "exponential": LEFT * torch.exp(-NUMBERS / 15) @ RIGHT.T,
    "power law": LEFT / NUMBERS @ RIGHT.T,
    "flat": torch.bmm(D, random(OUT, IN).view(OUT // 8, 8, IN)).view(OUT, IN),  # they hardly fall: the worst case
    "low rank and noise": random(OUT, 20) @ random(20, IN) + 0.05 * random(OUT + 1, IN)[1:],
    "exactly low rank": random(OUT, 7) @ random(7, IN),
}


def found(matrix: Tensor, tolerance: float = 0.05, max_rank: int = 64):
    """Of a matrix that is read in blocks of 48 rows."""
    rows = [slice(start, start + 48) for start in range(0, len(matrix), 48)]
    held: Any = SimpleNamespace(shape=matrix.shape, blocks=lambda: ((one, matrix[one]) for one in rows))
    return truncated_svd(held, tolerance, max_rank, torch.Generator().manual_seed(0))


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
