"""The start spans the leading singular directions of the weights' gradient, which it never forms."""

from __future__ import annotations

import pytest
import torch

from tests.ranks import run_ranks
from tests.tiny_llama import save_llama, save_pairs
from tests.training.layout_runs import Job

RANK = 4


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("start")
    base, data = str(save_llama(folder / "base", num_hidden_layers=2)), str(save_pairs(folder / "pairs.jsonl"))
    job = Job("start", base, data, peft={"method": "lora-ga", "lora_rank": RANK, "lora_ga_batches": 3})
    return run_ranks(1, "tests.lora_ga.start_runs:exact_and_started", job)[0]


def test_captured_energy_is_that_of_the_exact_subspace(found):
    for name, G in found.gradients.items():
        basis = found.A[name].double() * 3**0.5
        exact = torch.linalg.svdvals(G)[:RANK].square().sum()
        captured = (G @ basis.T).square().sum()
        assert captured > 0.95 * exact, name  # of a random model: flat spectra are the hard case


def test_rows_are_orthonormal_with_the_norm_of_loras_own_start(found):
    for A in found.A.values():
        torch.testing.assert_close(3 * A @ A.T, torch.eye(RANK), atol=1e-5, rtol=0)


def test_the_start_preserves_the_function(found):
    assert all((B == 0).all() for B in found.B.values())


def test_reported_energy_is_near_the_true_part(found):
    for name, G in found.gradients.items():
        true = float(torch.linalg.svdvals(G)[:RANK].square().sum() / G.square().sum())
        assert found.energy[name] == pytest.approx(true, rel=0.35), name
