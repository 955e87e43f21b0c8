"""A run's record for tests without ranks."""

import dataclasses
from typing import Any

from megatron_peft.checkpoint.run_record import RunRecord
from megatron_peft.config import RunConfig
from megatron_peft.models.shape import ModelShape, RopeScaling
from tests.checkpoint.runs import Files, configure, merged

BIASES = frozenset({"linear_qkv", "linear_fc2"})
SHAPE = ModelShape("llama", 4, 96, 160, 6, 2, 20, 1001, 256, linear_biases=BIASES, rope_scaling=RopeScaling())
RATE = {"max_lr": 5e-3, "min_lr": 0.0, "lr_warmup_steps": 0, "lr_decay_style": "cosine", "lr_decay_steps": 12}
DECAY = {"start_wd": 0.01, "end_wd": 0.01, "wd_incr_style": "constant", "wd_incr_steps": 12}
SCHEDULE = {"num_steps": 8, **RATE, **DECAY}


def make_config(**groups: dict[str, Any]) -> RunConfig:
    return configure(Files("bases", "pairs.jsonl", "work"), merged({"checkpoint": {"load": "runs"}}, groups))


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
