"""A run's model from its record, with the user's own flags on top."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_peft.arguments import parse_arguments
from megatron_peft.checkpoint.record import RunRecord
from megatron_peft.config import (
    ConfigurationError,
    DataConfig,
    ModelConfig,
    ParallelConfig,
    PeftConfig,
    RunConfig,
    TrainingConfig,
)
from megatron_peft.evaluation import run_flags
from megatron_peft.evaluation.run_flags import CARRIED, flags_of, model_flags
from megatron_peft.models.shape import ModelShape

SHAPE = ModelShape("llama", 4, 64, 128, 4, 2, 16, 100, 2048)
PEFT = {
    "lora": PeftConfig(lora_rank=3, lora_rs=True, target_modules=("linear_qkv", "*fc1"), lora_dropout=0.1),
    "boft": PeftConfig(method="boft", boft_block_size=4, rotation_side="input", peft_lr_rotation=1e-3),
    "hybrid": PeftConfig(method="hybrid", hybrid_lambda="fixed:0.25", lora_alpha=2.5),
    "full": PeftConfig(method="full"),
}


def _config(base: str = "base", peft: PeftConfig = PEFT["lora"]) -> RunConfig:
    return RunConfig(
        ParallelConfig(tensor_model_parallel_size=2, world_size=4),
        ModelConfig(base, bf16=True, make_vocab_size_divisible_by=64),
        peft,
        DataConfig(train_data_path=("a.jsonl",), tokenizer_type="NullTokenizer", vocab_size=99, seed=7),
        TrainingConfig(train_epochs=3, seed=7, micro_batch_size=2, global_batch_size=8),
    )


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path) -> str:
    """A run on a base model that is there."""
    base = tmp_path / "base"
    base.mkdir()
    record = RunRecord(_config(str(base)), SHAPE, {"iteration": 3}, (), None, None, None)
    monkeypatch.setattr(run_flags, "read_run_record", lambda folder: record)
    return str(base)


def _parse(*argv: str) -> RunConfig:
    return parse_arguments(model_flags(argv), {"WORLD_SIZE": "2"})


@pytest.mark.parametrize("method", PEFT)
def test_flags_of_a_configuration_give_its_model_again(method: str) -> None:
    config = _config(peft=PEFT[method])
    again = parse_arguments([*flags_of(config), "--train-data-path", "a.jsonl", "--train-iters", "1"], {})
    assert again.peft == config.peft
    for section, names in CARRIED.items():
        for name in names:
            assert getattr(getattr(again, section), name) == getattr(getattr(config, section), name)


def test_the_layout_is_the_users_and_not_the_runs(run: str) -> None:
    config = _parse("--load", "run", "--pipeline-model-parallel-size", "2")
    assert config.peft == PEFT["lora"] and config.model.pretrained_checkpoint == run and config.model.bf16
    assert config.parallel == ParallelConfig(pipeline_model_parallel_size=2, world_size=2)
    assert config.checkpoint.load == "run" and config.training.seed == config.data.seed == 7


def test_what_is_typed_holds(run: str) -> None:
    config = _parse("--load=run", "--pretrained-checkpoint", "elsewhere", "--lora-rank", "5")
    assert config.model.pretrained_checkpoint == "elsewhere" and config.peft.lora_rank == 5


def test_the_training_flags_of_a_run_may_stay() -> None:
    flags = "--pretrained-checkpoint base --train-data-path b.jsonl --train-epochs 2 --sequence-parallel"
    config = _parse(*flags.split(), "--tensor-model-parallel-size", "2")
    assert config.training.train_epochs == 2 and config.data.train_data_path == ("b.jsonl",)


def test_a_base_that_is_not_there_is_told_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    record: Any = RunRecord(_config("/gone/model"), SHAPE, {}, (), None, None, None)
    monkeypatch.setattr(run_flags, "read_run_record", lambda folder: record)
    with pytest.raises(ConfigurationError, match="base model /gone/model, which is not there.*--pretrained-checkpoint"):
        model_flags(["--load", "run"])
    assert model_flags(["--load", "run", "--pretrained-checkpoint", "here"])[-1] == "here"
