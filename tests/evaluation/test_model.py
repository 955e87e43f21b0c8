"""The model that is asked: its ends, its flags from a run's record, and the world that a program runs in.

Loading is in test_harness.py.
"""

from __future__ import annotations

import pytest
import torch.distributed as dist

from megatron_peft import config as c
from megatron_peft.arguments import parse_arguments
from megatron_peft.checkpoint.record import RunRecord
from megatron_peft.config import ConfigurationError, ParallelConfig, PeftConfig, RunConfig
from megatron_peft.evaluation import run_flags
from megatron_peft.evaluation.model import end_ids
from megatron_peft.evaluation.program import run_on_a_model
from megatron_peft.evaluation.run_flags import CARRIED, flags_of, model_flags
from megatron_peft.evaluation.sampling import Sampling
from megatron_peft.models.shape import ModelShape
from tests.tiny_llama import save_llama

PEFT = {
    "lora": PeftConfig(lora_rank=3, lora_rs=True, target_modules=("linear_qkv", "*fc1"), lora_dropout=0.1),
    "boft": PeftConfig(method="boft", boft_block_size=4, rotation_side="input", peft_lr_rotation=1e-3),
    "hybrid": PeftConfig(method="hybrid", hybrid_lambda="fixed:0.25", lora_alpha=2.5),
    "full": PeftConfig(method="full"),
}


@pytest.mark.parametrize(
    ("named", "ids"), [("2", {2}), ("[2, 5]", {2, 5}), ("null", set())], ids=["one", "several", "none"]
)
def test_a_model_may_name_several_ends_or_none(tmp_path, named, ids):
    assert end_ids(str(tmp_path)) == set()
    (tmp_path / "generation_config.json").write_text(f'{{"eos_token_id": {named}}}')
    assert end_ids(str(tmp_path)) == ids
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(ConfigurationError, match="generation_config.json cannot be read"):
        end_ids(str(tmp_path))


def _config(base: str = "base", peft: PeftConfig = PEFT["lora"]) -> RunConfig:
    return RunConfig(
        ParallelConfig(tensor_model_parallel_size=2, world_size=4),
        c.ModelConfig(base, bf16=True, make_vocab_size_divisible_by=64),
        peft,
        c.DataConfig(train_data_path=("a.jsonl",), tokenizer_type="NullTokenizer", vocab_size=99, seed=7),
        c.TrainingConfig(train_epochs=3, seed=7, micro_batch_size=2, global_batch_size=8),
    )


@pytest.fixture
def run(monkeypatch, tmp_path) -> str:
    """The base model's folder, which a run named `run` was trained on."""
    shape = ModelShape("llama", 4, 64, 128, 4, 2, 16, 100, 2048)
    record = RunRecord(_config(str(tmp_path / "base")), shape, {"iteration": 3}, (), None, None, None)
    monkeypatch.setattr(run_flags, "read_run_record", lambda folder: record)
    (tmp_path / "base").mkdir()
    return str(tmp_path / "base")


def _parse(*argv: str) -> RunConfig:
    return parse_arguments(model_flags(argv), {"WORLD_SIZE": "2"})


@pytest.mark.parametrize("method", PEFT)
def test_flags_of_a_configuration_give_its_model_again(method):
    config = _config(peft=PEFT[method])
    again = parse_arguments([*flags_of(config), "--train-data-path", "a.jsonl", "--train-iters", "1"], {})
    assert again.peft == config.peft
    for section, names in CARRIED.items():
        for name in names:
            assert getattr(getattr(again, section), name) == getattr(getattr(config, section), name)


def test_the_layout_is_the_users_and_not_the_runs_and_what_is_typed_holds(run):
    config = _parse("--load", "run", "--pipeline-model-parallel-size", "2")
    assert config.peft == PEFT["lora"] and config.model.pretrained_checkpoint == run and config.model.bf16
    assert config.parallel == ParallelConfig(pipeline_model_parallel_size=2, world_size=2)
    assert config.checkpoint.load == "run" and config.training.seed == config.data.seed == 7
    config = _parse("--load=run", "--pretrained-checkpoint", "elsewhere", "--lora-rank", "5")
    assert config.model.pretrained_checkpoint == "elsewhere" and config.peft.lora_rank == 5


def test_the_training_flags_of_a_run_may_stay():
    flags = "--pretrained-checkpoint base --train-data-path b.jsonl --train-epochs 2 --sequence-parallel"
    config = _parse(*flags.split(), "--tensor-model-parallel-size", "2")
    assert config.training.train_epochs == 2 and config.data.train_data_path == ("b.jsonl",)


def test_a_base_that_is_not_there_is_told_with_the_way_out(run, tmp_path):
    (tmp_path / "base").rmdir()
    with pytest.raises(ConfigurationError, match=f"base model {run}, which is not there.*--pretrained-checkpoint"):
        model_flags(["--load", "run"])
    assert model_flags(["--load", "run", "--pretrained-checkpoint", "here"])[-1] == "here"


@pytest.mark.parametrize(
    ("settings", "flags", "told"),
    [
        (lambda: Sampling(top_p=2.0), [], "p.py: error: --top-p is 2.0; it is a probability"),
        (lambda: 1, ["--load", "nowhere"], "p.py: error: nowhere holds no checkpoint"),
        (lambda: 1, ["--pretrained-checkpoint", "nowhere", "--wibble"], "p.py: error: several things are wrong:"),
    ],
)
def test_what_is_wrong_is_told_under_the_programs_name_before_a_world_is_made(capsys, settings, flags, told):
    ran = []
    with pytest.raises(SystemExit, match="2"):
        run_on_a_model(lambda *both: ran.append(both), settings, flags, "p.py")
    assert capsys.readouterr().err.startswith(told)
    assert not ran and not dist.is_initialized()


def test_the_program_runs_in_a_world_with_settings_and_model(tmp_path):
    base, seen = str(save_llama(tmp_path / "base", num_hidden_layers=1)), []

    def main(config: RunConfig, settings: str) -> None:
        seen.append((config.model.pretrained_checkpoint, settings, dist.get_world_size()))

    run_on_a_model(main, lambda: "settings", ["--pretrained-checkpoint", base], "p.py")
    assert seen == [(base, "settings", 1)] and not dist.is_initialized()
