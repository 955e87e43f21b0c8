"""A record read back is the configuration that was written."""

from __future__ import annotations

import json

import pytest

from megatron_peft.config import (
    CheckpointConfig,
    ConfigurationError,
    DataConfig,
    ModelConfig,
    ParallelConfig,
    PeftConfig,
    RunConfig,
    TrainingConfig,
)
from megatron_peft.config_record import config_from_dict, config_to_dict


@pytest.fixture
def config() -> RunConfig:
    return RunConfig(
        parallel=ParallelConfig(tensor_model_parallel_size=2, world_size=4),
        model=ModelConfig("model", shape_flags={"swiglu": True}, transformer={"hidden_dropout": 0.1}, bf16=True),
        peft=PeftConfig(target_modules=("linear_qkv",), lora_rank=4),
        data=DataConfig(train_data_path=("0.5", "a", "0.5", "b")),
        training=TrainingConfig(train_epochs=1.5),
        checkpoint=CheckpointConfig(save="runs/a", save_interval=5),
    )


def test_record_survives_json_and_comes_back_equal(config: RunConfig) -> None:
    assert config_from_dict(json.loads(json.dumps(config_to_dict(config)))) == config


def test_record_of_an_older_version_takes_defaults(config: RunConfig) -> None:
    record = config_to_dict(config)
    del record["logging"], record["peft"]["lora_rs"]
    assert config_from_dict(record) == config


@pytest.mark.parametrize(("section", "name"), [("peft", "quantum_rank"), ("quantum", "rank")])
def test_record_of_a_newer_version_is_refused_by_name(config: RunConfig, section: str, name: str) -> None:
    record = config_to_dict(config)
    record.setdefault(section, {})[name] = 1
    with pytest.raises(ConfigurationError, match=f"{section}.{name}"):
        config_from_dict(record)
