"""What the three starts make of singular triplets."""

from __future__ import annotations

import pytest
import torch

from megatron_peft.lora_ga.sketch import Triplets
from megatron_peft.lora_ga.starts import STARTS, Factors, with_all_rows
from megatron_peft.peft_config import PeftConfig

RANK, OUT, IN = 3, 16, 10
G = torch.randn(OUT, IN, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
U, S, VH = torch.linalg.svd(G, full_matrices=False)


def start(name: str):
    width = STARTS[name].triplets_a_rank * RANK
    return STARTS[name].factors(Triplets(U[:, :width], S[:width], VH[:width].T), RANK, OUT)


def test_there_is_one_for_each_value_of_the_flag():
    for name in STARTS:
        assert PeftConfig("lora-ga", lora_ga_init=name).subtracts_start is (name != "aligned")


def test_aligned_changes_nothing_and_has_the_norm_of_loras_start():
    A, B = start("aligned")
    assert not B.any()
    torch.testing.assert_close(3 * A @ A.T, torch.eye(RANK, dtype=torch.float64))


def test_papers_product_is_the_best_approximation_of_the_gradient():
    A, B = start("paper")
    torch.testing.assert_close(B @ A, (U[:, :RANK] * S[:RANK]) @ VH[:RANK])
    torch.testing.assert_close(A @ A.T, B.T @ B)  # each has the root of S


def test_original_takes_the_next_left_vectors():
    """So that dB A + B dA of the first step is the gradient's best approximation of rank 2r, up to one factor."""
    A, B = start("original")
    scale = OUT**0.25 / 4
    first_step = (G @ A.T) @ A + B @ (B.T @ G)
    torch.testing.assert_close(first_step / scale**2, (U[:, : 2 * RANK] * S[: 2 * RANK]) @ VH[: 2 * RANK])


@pytest.mark.parametrize("name", STARTS)
def test_shapes(name):
    A, B = start(name)
    assert A.shape == (RANK, IN) and B.shape == (OUT, RANK)


def test_rows_without_a_direction_stay_loras_own():
    S = torch.tensor([3.0, 1.0, 1e-9, 0.0], dtype=torch.float64)
    A, own = torch.ones(4, 6, dtype=torch.float64), torch.arange(24.0).view(4, 6)
    found = with_all_rows(Factors(A, torch.zeros(5, 4)), S, own)
    assert torch.equal(found.A[:2], A[:2]) and torch.equal(found.A[2:], own[2:].double())
