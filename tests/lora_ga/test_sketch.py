"""What a sketch finds and leaves, and what the starts make of its singular triplets."""

import pytest
import torch

from megatron_peft.lora_ga import sketch
from megatron_peft.lora_ga.sketch import (
    INIT_RULES,
    Factors,
    Triplets,
    orthonormal_basis,
    squared_residual_estimate,
    with_all_rows,
)


def alone(part: torch.Tensor) -> torch.Tensor:
    return part


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def decaying(decay: float = 0.5) -> torch.Tensor:  # [60, 40]
    U, V = torch.linalg.qr(draw(0, 60, 40))[0], torch.linalg.qr(draw(9, 40, 40))[0]
    return U * decay ** torch.arange(40) @ V.T


@pytest.mark.parametrize("spread", [1e3, 1e6])
def test_the_basis_is_orthonormal_at_any_condition(spread):
    Y = draw(2, 50, 8) * torch.logspace(0, -torch.tensor(spread).log10().item(), 8, dtype=torch.float64)
    Q = orthonormal_basis(Y, alone)
    torch.testing.assert_close(Q.T @ Q, torch.eye(8, dtype=torch.float64), atol=1e-9, rtol=0)


def test_a_sketch_of_low_rank_has_zero_columns_and_no_nan():
    Q = orthonormal_basis(draw(3, 30, 3).repeat(1, 2), alone)
    assert torch.isfinite(Q).all()
    assert torch.linalg.matrix_rank(Q) == 3
    assert torch.isfinite(orthonormal_basis(torch.zeros(30, 4), alone)).all()


def test_signs_follow_the_direction():
    G, direction = decaying(), draw(5, 40).float()
    Q = orthonormal_basis(G @ draw(1, 40, 20), alone)
    found = sketch.leading_triplets(Q, Q.T @ G, 4, alone)
    turned = sketch.with_fixed_signs(found._replace(U=-found.U, V=-found.V), direction, alone)
    same = sketch.with_fixed_signs(found, direction, alone)
    assert torch.equal(turned.V, same.V) and torch.equal(turned.U, same.U)
    assert (direction.double() @ same.V > 0).all()


def test_what_a_sketch_leaves_is_estimated():
    """Over many sketches the estimate is the mean of what they leave."""
    G = decaying(decay=0.9)
    left, estimated = [], []
    for seed in range(200):
        omega = draw(seed, 40, 12)
        Q = orthonormal_basis(G @ omega[:, :-1], alone)
        left.append(float((G - Q @ (Q.T @ G)).square().sum()))
        estimated.append(squared_residual_estimate(G @ omega, alone))
    assert sum(estimated) == pytest.approx(sum(left), rel=0.05)


def test_what_a_wide_enough_sketch_leaves_is_nothing():
    G, omega = decaying()[:, :6] @ draw(7, 6, 40), draw(8, 40, 12)
    assert squared_residual_estimate(G @ omega, alone) < 1e-9 * float(G.square().sum())
    assert squared_residual_estimate(0 * G @ omega, alone) == pytest.approx(0)


def test_original_takes_the_next_left_vectors():
    """So that dB A + B dA of the first step is the gradient's best approximation of rank 2r, up to one factor."""
    G, rank = draw(0, 16, 10), 3
    U, S, Vh = torch.linalg.svd(G, full_matrices=False)
    A, B = INIT_RULES["original"].factors(Triplets(U[:, : 2 * rank], S[: 2 * rank], Vh[: 2 * rank].T), rank, 16)
    first_step = (G @ A.T) @ A + B @ (B.T @ G)
    scale = 16**0.25 / 4
    torch.testing.assert_close(first_step / scale**2, (U[:, : 2 * rank] * S[: 2 * rank]) @ Vh[: 2 * rank])


def test_rows_without_a_direction_stay_loras_own():
    S = torch.tensor([3.0, 1.0, 1e-9, 0.0], dtype=torch.float64)
    A, own = torch.ones(4, 6, dtype=torch.float64), torch.arange(24.0).view(4, 6)
    found = with_all_rows(Factors(A, torch.zeros(5, 4)), S, own)
    assert torch.equal(found.A[:2], A[:2]) and torch.equal(found.A[2:], own[2:].double())
