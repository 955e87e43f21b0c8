"""Bloom's own parts split like everything else: ALiBi, the norm of the embedding, tied embeddings over two stages."""

from __future__ import annotations

import numpy as np
import pytest

from tests.ranks import run_ranks
from tests.tiny_bloom import save_bloom
from tests.tiny_llama import save_pairs
from tests.training.layout_runs import Job, run_jobs

NUM_STEPS = 6
pytestmark = pytest.mark.slow
TP2_SP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
INTERLEAVED = {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 1}
RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
METHODS = {
    "full": {"peft": {"method": "full"}, "optimizer": {"lr": 1e-3}},
    "hybrid": {
        "peft": {"method": "hybrid", "lora_rank": 4, "lora_ga_batches": 2, "boft_block_size": 2, "boft_factors": 2}
    },
    "urnn": {"peft": {"method": "urnn", "urnn_block_size": 4}},
    "lora-packed": {"peft": {"method": "lora", "lora_rank": 4}, "data_settings": {"pack_sequences": True}},
}
LAYOUTS = {
    "TP2+SP recompute": {"parallel": TP2_SP, "transformer": RECOMPUTE},
    "PP2 interleaved": {"parallel": INTERLEAVED},
}


@pytest.fixture(scope="module")
def curves(tmp_path_factory):
    folder = tmp_path_factory.mktemp("layout")
    base, data = str(save_bloom(folder / "base")), str(save_pairs(folder / "pairs.jsonl"))
    found = {}
    for num_ranks, layouts in ((1, {"alone": {}}), (2, LAYOUTS)):
        jobs = [
            Job(f"{method} {layout}", base, data, **METHODS[method], **layouts[layout], num_steps=NUM_STEPS)
            for method in METHODS
            for layout in layouts
        ]
        found.update(run_ranks(num_ranks, run_jobs, jobs)[0])
    return found


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_equals_one_process(curves, method, layout):
    alone, here = curves[f"{method} alone"], curves[f"{method} {layout}"]
    assert alone.losses[-1] < alone.losses[0]
    assert here.lambdas.keys() == alone.lambdas.keys() and bool(here.lambdas) == (method == "hybrid")
    for layer, mix in alone.lambdas.items():
        assert mix not in (0.0, 0.5, 1.0), "it has not moved"
        assert here.lambdas[layer] == pytest.approx(mix, rel=1e-4), layer
    np.testing.assert_allclose(here.losses, alone.losses, rtol=1e-5)
    np.testing.assert_allclose(here.grad_norms, alone.grad_norms, rtol=1e-4)
    np.testing.assert_allclose(here.validation_loss, alone.validation_loss, rtol=1e-5)
