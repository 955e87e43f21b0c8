"""The layout never changes the model: losses, gradient norms and validation losses equal one process's."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

from tests.ranks import run_ranks
from tests.tiny_llama import save_llama, save_pairs
from tests.training.layout_runs import Curve, Job, run_jobs

TP2 = {"tensor_model_parallel_size": 2}
SP = {**TP2, "sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2}
RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
GROUPS_OF_FOUR = {"boft_block_size": 2, "boft_factors": 2}
SHORT = {"train_iters": 8}  # LoRA and full fine-tuning run 20 steps
METHODS = {
    "lora": {"peft": {"method": "lora", "lora_rank": 4}},
    "boft": {"peft": {"method": "boft", **GROUPS_OF_FOUR}, "optimizer": {"lr": 1e-2}, "training": SHORT},
    "boft-input": {
        "peft": {"method": "boft", "rotation_side": "input", **GROUPS_OF_FOUR},
        "optimizer": {"lr": 1e-2},
        "training": SHORT,
    },
    "lora-ga": {"peft": {"method": "lora-ga", "lora_rank": 4, "lora_ga_batches": 2}, "training": SHORT},
    "hybrid": {
        "peft": {"method": "hybrid", "lora_rank": 4, "lora_ga_batches": 2, "peft_lr_rotation": 2e-3, **GROUPS_OF_FOUR},
        "training": SHORT,
    },
    "urnn": {"peft": {"method": "urnn", "urnn_block_size": 4}, "training": SHORT},
    "riemannian": {
        "peft": {"method": "urnn", "urnn_update": "riemannian", "urnn_block_size": 4, "peft_lr_rotation": 0.2},
        "training": SHORT,
    },
    "projection": {
        "peft": {"method": "boft", "boft_parametrization": "projection", **GROUPS_OF_FOUR},
        "training": SHORT,
    },
    "hybrid-folded": {
        "peft": {
            "method": "hybrid",
            "hybrid_rotation": "urnn",
            "hybrid_lambda": "descent",
            "hybrid_merge_interval": 3,
            "lora_rank": 4,
            "lora_ga_batches": 2,
            "lora_ga_init": "original",
            "peft_lr_rotation": 2e-3,
            "urnn_block_size": 4,
        },
        "training": SHORT,
    },
    "full": {"peft": {"method": "full"}, "optimizer": {"lr": 1e-3}},
    "lora-packed": {
        "peft": {"method": "lora", "lora_rank": 4},
        "data_settings": {"pack_sequences": True},
        "training": SHORT,
    },
}
# Two microbatches a step where one process has four: a collective of gloo costs a millisecond whatever it carries, and
# how samples fall on microbatches must not matter either.
HALF_AS_MANY = {"training": {"micro_batch_size": 4}}
ON_TWO_RANKS = {
    "TP2": {"parallel": TP2, **HALF_AS_MANY},
    "TP2+SP": {"parallel": SP, **HALF_AS_MANY},
    "TP2 selective recompute": {"parallel": TP2, "transformer": {"recompute_granularity": "selective"}, **HALF_AS_MANY},
    "PP2": {"parallel": PP2},
    "PP2 uneven, first": {"parallel": {**PP2, "decoder_first_pipeline_num_layers": 1}},
    "PP2 uneven, last": {"parallel": {**PP2, "decoder_last_pipeline_num_layers": 1}},
    "PP2 interleaved": {"parallel": {**PP2, "num_layers_per_virtual_pipeline_stage": 1}},
    "DP2": {},
    "DP2 distributed optimizer": {"optimizer": {"use_distributed_optimizer": True}},
    "DP2 overlapped": {
        "optimizer": {"use_distributed_optimizer": True, "overlap_param_gather": True},
        "training": {"overlap_grad_reduce": True},
    },
}
ON_FOUR_RANKS = {
    "TP2xPP2 recompute": {"parallel": {**TP2, **PP2}, "transformer": RECOMPUTE, **HALF_AS_MANY},
    "TP2xPP2+SP": {"parallel": {**SP, **PP2}, **HALF_AS_MANY},
}

LAYOUTS = {**ON_TWO_RANKS, **ON_FOUR_RANKS}
# `make test` runs every layout for LoRA and the Hybrid and two for each other method; `make test-all` runs them all.
QUICK_LAYOUTS = {
    "lora": LAYOUTS,
    "hybrid": LAYOUTS,
    "boft": ("TP2+SP", "PP2"),
    "boft-input": ("TP2", "TP2xPP2+SP"),
    "lora-ga": ("TP2+SP", "DP2 distributed optimizer"),
    "urnn": ("TP2+SP", "DP2 distributed optimizer"),
    "riemannian": ("TP2", "DP2 distributed optimizer"),
    "projection": ("TP2+SP", "DP2 distributed optimizer"),
    "hybrid-folded": ("TP2", "DP2 distributed optimizer"),
    "full": ("TP2xPP2 recompute", "DP2 overlapped"),
    "lora-packed": ("TP2+SP", "PP2 interleaved"),
}
REFUSED = [(method, "DP2 overlapped") for method in ("riemannian", "projection", "hybrid-folded")]
CASES = [
    pytest.param(
        method,
        layout,
        marks=[] if layout in QUICK_LAYOUTS[method] else [pytest.mark.slow],
    )
    for method in METHODS
    for layout in LAYOUTS
    if (method, layout) not in REFUSED
]


def merged(*groups: dict) -> dict:
    keys = {key for group in groups for key in group}
    return {key: {name: value for group in groups for name, value in group.get(key, {}).items()} for key in keys}


def layout_job(method: str, layout: str, settings: dict, base: str, data: str) -> Job:
    return Job(f"{method} {layout}", base, data, **merged(METHODS[method], settings))


@pytest.fixture(scope="module")
def curve(tmp_path_factory):
    """`curve(method, layout)`: one run, in a world of its own; the ranks agree on it."""
    folder = tmp_path_factory.mktemp("layout")
    base, data = str(save_llama(folder / "base")), str(save_pairs(folder / "pairs.jsonl"))

    @cache
    def run(method: str, layout: str) -> Curve:
        job = layout_job(method, layout, LAYOUTS.get(layout, {}), base, data)
        num_ranks = 1 if layout == "alone" else 4 if layout in ON_FOUR_RANKS else 2
        first, *others = (curves[job.name] for curves in run_ranks(num_ranks, run_jobs, [job]))
        assert all(other == first for other in others), "ranks report different numbers"
        return first

    return run


@pytest.mark.parametrize(("method", "layout"), CASES)
def test_layout_equals_one_process(curve, method, layout):
    alone, here = curve(method, "alone"), curve(method, layout)
    np.testing.assert_allclose(here.losses, alone.losses, rtol=1e-5)
    np.testing.assert_allclose(here.grad_norms, alone.grad_norms, rtol=1e-4)
    np.testing.assert_allclose(here.validation_loss, alone.validation_loss, rtol=1e-5)
    assert here.lambdas.keys() == alone.lambdas.keys() and bool(here.lambdas) == method.startswith("hybrid")
    np.testing.assert_allclose(
        [here.lambdas[layer] for layer in alone.lambdas], list(alone.lambdas.values()), rtol=1e-4
    )
    assert here.replicas_agree


@pytest.mark.parametrize("method", METHODS)
def test_training_learns(curve, method):
    losses = curve(method, "alone").losses
    assert losses[-1] < losses[0] - 0.05
