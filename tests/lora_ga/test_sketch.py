"""The sketch's singular triplets against an exact SVD, in one process."""

from __future__ import annotations

import pytest
import torch

from megatron_peft.lora_ga.sketch import (
    leading_triplets,
    orthonormal_basis,
    squared_residual_estimate,
    with_fixed_signs,
)


def alone(part: torch.Tensor) -> torch.Tensor:
    return part


def decaying(rows: int = 60, columns: int = 40, decay: float = 0.5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    U, _ = torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64))
    V, _ = torch.linalg.qr(torch.randn(columns, columns, generator=generator, dtype=torch.float64))
    return U * decay ** torch.arange(columns) @ V.T


def sketched(G: torch.Tensor, width: int = 20, rank: int = 4):
    omega = torch.randn(G.shape[1], width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    Q = orthonormal_basis(G @ omega, alone)
    return leading_triplets(Q, Q.T @ G, rank, alone)


def test_triplets_are_those_of_an_exact_svd():
    G = decaying()
    U, S, Vh = torch.linalg.svd(G)
    found = sketched(G)
    torch.testing.assert_close(found.S, S[:4])
    torch.testing.assert_close((found.V.T @ Vh[:4].T).abs(), torch.eye(4, dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close((found.U * found.S) @ found.V.T, (U[:, :4] * S[:4]) @ Vh[:4], atol=1e-6, rtol=0)


@pytest.mark.parametrize("spread", [1e3, 1e6])
def test_the_basis_is_orthonormal_at_any_condition(spread):
    Y = torch.randn(50, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    Y = Y * torch.logspace(0, -torch.tensor(spread).log10().item(), 8, dtype=torch.float64)
    Q = orthonormal_basis(Y, alone)
    torch.testing.assert_close(Q.T @ Q, torch.eye(8, dtype=torch.float64), atol=1e-9, rtol=0)


def test_a_sketch_of_low_rank_has_zero_columns_and_no_nan():
    Y = torch.randn(30, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).repeat(1, 2)
    Q = orthonormal_basis(Y, alone)
    assert torch.isfinite(Q).all()
    assert torch.linalg.matrix_rank(Q) == 3
    assert torch.isfinite(orthonormal_basis(torch.zeros(30, 4), alone)).all()


def test_a_holder_of_some_rows_finds_its_rows():
    omega = torch.randn(40, 12, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    Y = decaying() @ omega
    sums: list[torch.Tensor] = []

    def record(part: torch.Tensor) -> torch.Tensor:
        sums.append(part.clone())
        return part

    whole = orthonormal_basis(Y, record)
    answers = iter(sums)
    torch.testing.assert_close(orthonormal_basis(Y[:25], lambda part: next(answers)), whole[:25])


def test_signs_follow_the_direction():
    found = sketched(decaying())
    direction = torch.randn(40, generator=torch.Generator().manual_seed(5))
    turned = with_fixed_signs(found._replace(U=-found.U, V=-found.V), direction, alone)
    same = with_fixed_signs(found, direction, alone)
    assert torch.equal(turned.V, same.V) and torch.equal(turned.U, same.U)
    assert (direction.double() @ same.V > 0).all()


def test_what_a_sketch_leaves_is_estimated():
    """Over many sketches the estimate is the mean of what they leave."""
    G = decaying(decay=0.9)
    left, estimated = [], []
    for seed in range(200):
        omega = 0.3 * torch.randn(40, 12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        Q = orthonormal_basis(G @ omega[:, :-1], alone)
        left.append(float((G - Q @ (Q.T @ G)).square().sum()))
        estimated.append(squared_residual_estimate(G @ omega, 0.09, alone))
    assert sum(estimated) == pytest.approx(sum(left), rel=0.05)


def test_what_a_wide_enough_sketch_leaves_is_nothing():
    G = decaying()[:, :6] @ torch.randn(6, 40, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    omega = torch.randn(40, 12, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    assert squared_residual_estimate(G @ omega, 1.0, alone) < 1e-9 * float(G.square().sum())
    assert squared_residual_estimate(0 * G @ omega, 1.0, alone) == pytest.approx(0)
