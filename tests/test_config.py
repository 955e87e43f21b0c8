"""Contradictions are found, each with its flag and numbers, and all of a group at once."""

from __future__ import annotations

import pytest

from megatron_peft.config import (
    CheckpointConfig,
    ConfigurationError,
    DataConfig,
    LoggingConfig,
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


GROUP_CONTRADICTIONS = [
    (ParallelConfig, {"tensor_model_parallel_size": 3, "world_size": 4}, "4 processes cannot hold .* 3"),
    (ParallelConfig, {"tensor_model_parallel_size": 0}, "--tensor-model-parallel-size is 0"),
    (ParallelConfig, {"sequence_parallel": True}, "--sequence-parallel .* above 1"),
    (ParallelConfig, {"num_layers_per_virtual_pipeline_stage": 2}, "--num-layers-per-virtual-pipeline-stage"),
    (ParallelConfig, {"decoder_first_pipeline_num_layers": 2}, "--decoder-first-pipeline-num-layers"),
    (
        ParallelConfig,
        {
            "pipeline_model_parallel_size": 2,
            "world_size": 2,
            "num_layers_per_virtual_pipeline_stage": 1,
            "decoder_last_pipeline_num_layers": 2,
        },
        "stages of equal size",
    ),
    (ModelConfig, {}, "no base model: --pretrained-checkpoint"),
    (ModelConfig, {"pretrained_checkpoint": "m", "transformer": {"hidden_dropout": 1.5}}, "--hidden-dropout is 1.5"),
    (
        ModelConfig,
        {"pretrained_checkpoint": "m", "transformer": {"recompute_granularity": "full"}},
        "--recompute-granularity full needs --recompute-method",
    ),
    (
        ModelConfig,
        {"pretrained_checkpoint": "m", "transformer": {"recompute_method": "block", "recompute_num_layers": 1}},
        "--recompute-method, --recompute-num-layers belong to --recompute-granularity full",
    ),
    (PeftConfig, {"method": "prefix"}, "--peft-method prefix is not one of full, lora"),
    (PeftConfig, {"lora_rank": 0}, "--lora-rank is 0"),
    (PeftConfig, {"lora_dropout": 1.0}, "--lora-dropout is 1.0"),
    (PeftConfig, {"target_modules": ()}, "--peft-target-modules needs"),
    (DataConfig, {}, "no training data"),
    (DataConfig, {**DATA, "data_path": ("p",)}, "exclude one another"),
    (DataConfig, {**DATA, "split": "9,1"}, "--split cuts"),
    (DataConfig, {"data_path": ("p",), "split": "9;1"}, "--split 9;1"),
    (DataConfig, {"data_path": ("p",), "split": "0,0,0"}, "--split 0,0,0"),
    (DataConfig, {"data_path": ("p",), "split": "1,1,1,1"}, "--split 1,1,1,1"),
    (DataConfig, {"train_data_path": ("a.jsonl", "b")}, "--train-data-path mixes .*a.jsonl b"),
    (DataConfig, {"data_path": ("p",), "pack_sequences": True}, "--pack-sequences"),
    (DataConfig, {**DATA, "tokenizer_type": "NullTokenizer"}, "needs --vocab-size"),
    (DataConfig, {**DATA, "tokenizer_type": "SentencePieceTokenizer"}, "needs --tokenizer-model"),
    (TrainingConfig, {}, "none given"),
    (TrainingConfig, {"train_iters": 1, "train_epochs": 1}, "given: --train-iters, --train-epochs"),
    (OptimizerSettings, {"lr": 1e-4, "min_lr": 1e-3}, "--min-lr 0.001 is above --lr 0.0001"),
    (OptimizerSettings, {"lr_warmup_init": 1.0}, "--lr-warmup-init 1.0 is above"),
    (OptimizerSettings, {"lr_warmup_fraction": 0.1, "lr_warmup_iters": 1}, "--lr-warmup-fraction excludes"),
    (OptimizerSettings, {"lr_warmup_fraction": 1.0}, "--lr-warmup-fraction is 1.0"),
    (OptimizerSettings, {"lr_decay_style": "WSD"}, "--lr-wsd-decay-iters"),
    (OptimizerSettings, {"lr_wsd_decay_iters": 3}, "--lr-wsd-decay-iters belong to --lr-decay-style WSD"),
    (OptimizerSettings, {"end_weight_decay": 0.1}, "--weight-decay-incr-style"),
    (OptimizerSettings, {"weight_decay_incr_style": "linear", "end_weight_decay": 0.1}, "given: None and 0.1"),
    (OptimizerSettings, {"overlap_param_gather": True}, "--overlap-param-gather needs --use-distributed-optimizer"),
    (OptimizerSettings, {"optimizer": "sgd", "use_distributed_optimizer": True}, "shards Adam only"),
    (
        OptimizerSettings,
        {"override_opt_param_scheduler": True, "use_checkpoint_opt_param_scheduler": True},
        "exclude one another",
    ),
    (CheckpointConfig, {"save_interval": 5}, "--save-interval 5 needs --save"),
    (LoggingConfig, {"wandb_project": "p"}, "--wandb-project p needs --wandb-exp-name"),
    (LoggingConfig, {"log_interval": 0}, "--log-interval is 0"),
]


@pytest.mark.parametrize(("group", "values", "message"), GROUP_CONTRADICTIONS)
def test_contradiction_inside_a_group(group: type, values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message) as caught:
        group(**values)
    assert len(caught.value.problems) == 1


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


def test_all_contradictions_of_a_group_are_told_at_once() -> None:
    with pytest.raises(ConfigurationError) as caught:
        OptimizerSettings(lr=-1.0, min_lr=-2.0, lr_warmup_init=-3.0, clip_grad=-1)
    flags = {problem.split(" ")[0] for problem in caught.value.problems}
    assert flags == {"--lr", "--min-lr", "--lr-warmup-init", "--clip-grad"}
    assert str(caught.value).count("\n") == len(caught.value.problems) - 1


def test_derived_sizes() -> None:
    config = run_config(
        parallel={"tensor_model_parallel_size": 2, "world_size": 8},
        training={"micro_batch_size": 2, "global_batch_size": 24},
    )
    assert (config.parallel.data_parallel_size, config.num_microbatches, config.global_batch_size) == (4, 3, 24)


def test_global_batch_defaults_to_one_microbatch_a_rank() -> None:
    config = run_config(parallel={"world_size": 4}, training={"micro_batch_size": 2})
    assert (config.global_batch_size, config.num_microbatches) == (8, 1)
