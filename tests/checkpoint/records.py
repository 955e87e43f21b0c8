"""A run's record for tests without ranks."""

from __future__ import annotations

import dataclasses
from typing import Any

from megatron_peft.checkpoint.record import RunRecord
from megatron_peft.config import (
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    OptimizerSettings,
    ParallelConfig,
    PeftConfig,
    RunConfig,
    TrainingConfig,
)
from megatron_peft.models.shape import ModelShape, RopeScaling

SHAPE = ModelShape(
    architecture="llama",
    num_layers=4,
    hidden_size=96,
    ffn_hidden_size=160,
    num_attention_heads=6,
    num_query_groups=2,
    kv_channels=20,
    vocab_size=1001,
    max_position_embeddings=256,
    linear_biases=frozenset({"linear_qkv", "linear_fc2"}),
    rope_scaling=RopeScaling(),
)
SCHEDULE = {
    "max_lr": 5e-3,
    "lr_warmup_steps": 0,
    "num_steps": 8,
    "lr_decay_style": "cosine",
    "lr_decay_steps": 12,
    "min_lr": 0.0,
    "start_wd": 0.01,
    "end_wd": 0.01,
    "wd_incr_style": "constant",
    "wd_incr_steps": 12,
}


def make_config(**groups: dict[str, Any]) -> RunConfig:
    """A LoRA run with changes by group of the configuration."""
    return RunConfig(
        parallel=ParallelConfig(),
        model=ModelConfig(**{"pretrained_checkpoint": "bases/base", **groups.get("model", {})}),
        peft=PeftConfig(**{"lora_rank": 4, **groups.get("peft", {})}),
        data=DataConfig(train_data_path=("pairs.jsonl",)),
        training=TrainingConfig(train_iters=3),
        optimizer=OptimizerSettings(**groups.get("optimizer", {})),
        checkpoint=CheckpointConfig(load="runs"),
    )


def make_record(**changes: Any) -> RunRecord:
    record = RunRecord(
        config=make_config(),
        shape=SHAPE,
        position={"iteration": 2, "consumed_samples": 8, "consumed_tokens": 100},
        adapted_layers=("decoder.layers.0.mlp.linear_fc1",),
        base_fingerprint={"config.json": "12", "model.safetensors": "34"},
        schedule=SCHEDULE,
        optimizer_steps={"decoder.layers.0.mlp.linear_fc1.adapter.A": 2},
    )
    return dataclasses.replace(record, **changes)
