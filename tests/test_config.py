"""Contradictions between sections are found, each with its flag and numbers; sizes that follow from several."""

from __future__ import annotations

import pytest

from megatron_peft.config import (
    ConfigurationError,
    DataConfig,
    ModelConfig,
    OptimizerSettings,
    ParallelConfig,
    PeftConfig,
    RunConfig,
    TrainingConfig,
)

DATA = {"train_data_path": ("a.jsonl",)}


def run_config(**groups: dict[str, object]) -> RunConfig:
    return RunConfig(
        parallel=ParallelConfig(**groups.get("parallel", {})),
        model=ModelConfig(pretrained_checkpoint="model", **groups.get("model", {})),
        peft=PeftConfig(),
        data=DataConfig(**DATA, **groups.get("data", {})),
        training=TrainingConfig(**{"train_iters": 10, **groups.get("training", {})}),
        optimizer=OptimizerSettings(**groups.get("optimizer", {})),
    )


FULL_RECOMPUTE = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
    "distribute_saved_activations": True,
}
RUN_CONTRADICTIONS = [
    (
        {"training": {"micro_batch_size": 2, "global_batch_size": 7}, "parallel": {"world_size": 2}},
        "--global-batch-size 7 .* 2 x 2 .* = 4: use 4 or 8",
    ),
    (
        {
            "parallel": {
                "pipeline_model_parallel_size": 2,
                "num_layers_per_virtual_pipeline_stage": 1,
                "world_size": 2,
            },
            "training": {"global_batch_size": 3},
        },
        "interleaved .* 2 microbatches a step, but --global-batch-size 3 gives 3",
    ),
    (
        {
            "parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True, "world_size": 2},
            "data": {"seq_length": 33},
        },
        "--seq-length 33 .* use 32",
    ),
    ({"optimizer": {"lr_decay_samples": 5}}, "--lr-decay-samples .* use --lr-decay-iters"),
    (
        {"training": {"train_iters": None, "train_samples": 9}, "optimizer": {"lr_warmup_iters": 1}},
        "--lr-warmup-iters .* use --lr-warmup-samples",
    ),
    ({"optimizer": {"lr_warmup_iters": 10}}, "--lr-warmup-iters 10 .* below the 10 iters"),
    (
        {"optimizer": {"overlap_param_gather": True, "use_distributed_optimizer": True}},
        "--overlap-param-gather needs --overlap-grad-reduce",
    ),
    ({"model": {"transformer": FULL_RECOMPUTE}}, "--distribute-saved-activations"),
    (
        {
            "model": {"transformer": FULL_RECOMPUTE},
            "parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True, "world_size": 2},
        },
        "--distribute-saved-activations",
    ),
]


@pytest.mark.parametrize(("groups", "message"), RUN_CONTRADICTIONS)
def test_contradiction_between_groups(groups: dict[str, dict[str, object]], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message) as caught:
        run_config(**groups)
    assert len(caught.value.problems) == 1


def test_derived_sizes() -> None:
    config = run_config(
        parallel={"tensor_model_parallel_size": 2, "world_size": 8},
        training={"micro_batch_size": 2, "global_batch_size": 24},
    )
    assert (config.parallel.data_parallel_size, config.num_microbatches, config.global_batch_size) == (4, 3, 24)


def test_global_batch_defaults_to_one_microbatch_a_rank() -> None:
    config = run_config(parallel={"world_size": 4}, training={"micro_batch_size": 2})
    assert (config.global_batch_size, config.num_microbatches) == (8, 1)
