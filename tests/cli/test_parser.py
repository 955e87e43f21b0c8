"""Flags in, typed configuration out; and everything that is wrong with them in one message."""

import os
import subprocess
import sys
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from megatron_peft.cli.command import Command
from megatron_peft.cli.flags import flags_of
from megatron_peft.cli.parser import HUB_FLAGS, RunFlags, ShapeReader, read_config, tell_error
from megatron_peft.commands import train
from megatron_peft.config import (
    CheckpointConfig,
    ConfigurationError,
    DataConfig,
    ModelConfig,
    OptimizerSettings,
    ParallelConfig,
    PeftConfig,
    RunConfig,
    TrainingConfig,
    option,
)
from megatron_peft.models.shape import ModelShape
from tests.time_limits import seconds

NEEDED = ["--pretrained-checkpoint", "model", "--train-data-path", "a.jsonl", "--train-iters", "10"]
REPOSITORY = Path(__file__).parents[2]
FOUR: dict[str, Any] = {"world_size": 4}
SHAPE = ModelShape("llama", 4, 64, 128, 4, 2, 16, 100, 2048)


def parse(*flags: str, world_size: int | str = 1, read_shape: ShapeReader | None = None) -> RunConfig:
    return read_config([*flags, *NEEDED], {"WORLD_SIZE": str(world_size)}, read_shape)


def complaint(*flags: str, **options: Any) -> str:
    """What is told about wrong flags."""
    with pytest.raises(ConfigurationError) as caught:
        parse(*flags, **options)
    return str(caught.value)


def test_only_typed_flags_differ_from_the_dataclasses_defaults() -> None:
    """Numbers, lists, choices and switches, in Megatron's spellings; a seed is that of training and of the data."""
    typed = parse(
        *"--tensor-model-parallel-size 2 --sequence-parallel --distributed-backend gloo --bf16".split(),
        *"--peft-target-modules linear_qkv linear_fc* --lora-alpha 8 --lora-rs --lora-rank=4".split(),
        *"--lr 2e-3 --override-opt_param-scheduler --save runs/x --no-exit-signal-handler".split(),
        *"--no-check-for-nan-in-loss-and-grad --distributed-timeout-minutes 1.5 --seed 7".split(),
        **FOUR,
    )
    assert typed == RunConfig(
        ParallelConfig(2, sequence_parallel=True, distributed_backend="gloo", distributed_timeout_minutes=1.5, **FOUR),
        ModelConfig("model", bf16=True),
        PeftConfig(target_modules=("linear_qkv", "linear_fc*"), lora_rank=4, lora_alpha=8.0, lora_rs=True),
        DataConfig(("a.jsonl",), seed=7),
        TrainingConfig(train_iters=10, exit_signal_handler=False, check_for_nan_in_loss_and_grad=False, seed=7),
        OptimizerSettings(lr=2e-3, override_opt_param_scheduler=True),
        CheckpointConfig("runs/x"),
    )


def test_only_typed_shape_and_run_fields_are_kept() -> None:
    config = parse(
        *"--num-layers 4 --swiglu --norm-epsilon 1e-6 --vocab-size 100".split(),
        *"--hidden-dropout 0.1 --recompute-activations --no-rope-fusion".split(),
    )
    shape = {"num_layers": 4, "swiglu": True, "norm_epsilon": 1e-6, "vocab_size": 100}
    run = {"hidden_dropout": 0.1, "recompute_granularity": "selective", "apply_rope_fusion": False}
    assert config.model.shape_flags == shape and config.model.transformer == run
    null = parse("--tokenizer-type", "NullTokenizer", "--vocab-size", "50", read_shape=lambda folder: SHAPE)
    assert null.data.vocab_size == 50 and null.model.shape_flags == {}, "its vocabulary is not the checkpoint's"


def test_flags_that_hold_anyway_change_nothing_and_a_later_value_replaces_an_earlier_one() -> None:
    """Scripts append "$@" to their own flags."""
    assert parse(*"--use-mcore-models --ckpt-format torch_dist --accumulate-allreduce-grads-in-fp32".split()) == parse()
    assert parse("--lr", "1e-3", "--lr", "1e-2").optimizer.lr == 1e-2


def test_stops_may_be_typed_one_by_one_and_of_other_lists_the_last_holds(tmp_path: Path) -> None:
    """As with Megatron, whose scripts end in what their user types."""
    file = tmp_path / "run.yaml"
    file.write_text("valid-data-path: [old.jsonl]\nstop: old\n")
    typed = ["--valid-data-path", "a.jsonl", "b.jsonl", "--stop=---", "--valid-data-path=c.jsonl", "--stop", "###"]
    flags = RunFlags(["--config", str(file), *typed], [*flags_of(Listed)])
    assert flags.values["config"] == {"valid_data_path": ("c.jsonl",)}
    assert flags.values["command"] == {"stop": ("---", "###")}


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--trian-iters 10", "--trian-iters is not a known flag; did you mean --train-iters?"),
        ("--train_iters 10", "did you mean --train-iters?"),
        ("--lern-rate 1e-3", "--learning-rate is a flag of Hugging Face's libraries; here it is --lr."),
        ("--rl-decay-style linear", "did you mean --lr-decay-style?"),
        ("--num-expert 8", "did you mean --num-experts, a Megatron flag that is not supported?"),
        ("--wibble", "--wibble is not a known flag; --help lists them."),
        ("--load-in-4bit", "is a flag of Hugging Face's libraries; here it is not supported: the base is in float32"),
        ("--gradient-checkpointing", "here it is --recompute-granularity full --recompute-method uniform"),
        ("--save_total_limit 3", "--save_total_limit is a flag of Hugging Face's libraries; here it is --keep-last"),
        ("--tensor-model-parallel 1", "is not a known flag; did you mean --tensor-model-parallel-size?"),
        ("--keep-last 2", "did you mean --keep-last-checkpoints?"),  # --keep-best is nearer by its letters
        ("--num-experts 8", "--num-experts is a Megatron flag that megatron_peft does not support (mixture of exp"),
        ("--moe-of-tomorrow 8", "does not support (mixture of experts); remove it."),
        ("--fp16", "(float16); use --bf16."),
        ("--no-gradient-reduce-div-fusion", "--no-gradient-reduce-div-fusion is a Megatron flag"),
        ("--disable-mamba-mem-eff-path", "(Mamba)"),
        ("--lr fast", "--lr: invalid number value: 'fast'."),
        ("--lr nan", "--lr: invalid number value: 'nan'."),
        ("--lr", "--lr needs a value."),
        ("--lr 1 2", "--lr takes one value, but 1 2 follow it."),
        ("--lr -1e-3", "--lr is -0.001; it must be above 0."),
        ("--seq-length 12.5", "--seq-length: invalid int value: '12.5'."),
        ("--overlong cut", "--overlong: invalid choice: 'cut'"),
        ("--ckpt-format torch", "--ckpt-format: invalid choice: 'torch'"),
        ("--bf16 true", "--bf16 takes no value, but true follows it."),
        ("--recompute-activations --recompute-granularity full", "contradict each other"),
        ("--use-flash-attn --attention-backend unfused", "contradict each other"),
        (
            "--bf16 --grad-reduce-in-bf16 --accumulate-allreduce-grads-in-fp32",
            "--grad-reduce-in-bf16 and --accumulate-allreduce-grads-in-fp32 contradict each other: leave one out.",
        ),
        ("--profile --profile-step-start 20 --profile-step-end 21", "--profile needs --profile-step-start below"),
        ("train.jsonl", "unexpected argument train.jsonl"),
        ("--tensor-model-parallel-size 2", "1 processes cannot hold"),
        ("--global-batch-size 3 --micro-batch-size 2", "--global-batch-size 3 is not a multiple"),
    ],
)
def test_wrong_flag_is_told(flags: str, expected: str) -> None:
    assert expected in complaint(*flags.split())


def test_nothing_given_names_what_is_needed() -> None:
    with pytest.raises(ConfigurationError) as caught:
        read_config([], {})
    assert all(name in str(caught.value) for name in ("--pretrained-checkpoint", "--train-data-path", "--train-iters"))


def test_everything_wrong_is_told_in_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    flags = "--num-experts 8 --lr fast --lora-dropout 2 --async-save --num-layers 5 --tensor-model-parallel-size 4"
    with pytest.raises(ConfigurationError) as caught:
        parse(*flags.split(), read_shape=lambda folder: SHAPE, **FOUR)
    assert tell_error(caught.value, {}) == 2
    out, told = capsys.readouterr()
    assert out == "" and told.startswith("pretrain_peft.py: error: ") and told.count("error: ") == 1
    names = ("--num-experts", "--lr:", "--lora-dropout", "--async-save", "--num-layers 5", "2 key-value heads")
    assert [name for name in names if name not in told] == []
    assert told.count("\n  - ") == len(names)


def test_a_model_that_the_hub_lacks_is_told_with_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    def local_model(name: str, flag: str) -> str:
        raise ConfigurationError(f"{flag} {name} is not there.")

    monkeypatch.setitem(HUB_FLAGS, "pretrained_checkpoint", local_model)
    told = complaint("--lr", "-1", "--num-layers", "5", read_shape=lambda _: SHAPE)
    assert told == "--pretrained-checkpoint model is not there.\n--lr is -1.0; it must be above 0."


def test_transformer_engine_that_is_not_installed_is_told_with_the_rest(monkeypatch, capsys) -> None:
    monkeypatch.setattr(train, "find_spec", lambda name: None)
    assert train.main([*NEEDED, "--transformer-impl", "transformer_engine", "--lr", "-1"]) == 2
    told = capsys.readouterr().err
    assert "transformer_engine needs a GPU and the package" in told and "--lr is -1.0" in told


def test_checkpoint_is_asked_for_the_folder_that_was_typed() -> None:
    def read_shape(folder: str) -> ModelShape:
        raise ConfigurationError(f"{folder} has no config.json.")

    assert "model has no config.json." in complaint(read_shape=read_shape)
    assert parse("--num-layers", "4", read_shape=lambda folder: SHAPE).model.shape_flags == {"num_layers": 4}
    told = complaint("--seq-length", "4096", read_shape=lambda folder: SHAPE)
    assert "--seq-length 4096 is above the 2048 positions" in told
    assert parse(read_shape=lambda folder: replace(SHAPE, max_position_embeddings=64)) == parse()
    for world_size in ("0", "two"):
        assert f"WORLD_SIZE is '{world_size}'" in complaint(world_size=world_size)


def test_adapters_that_do_not_fit_the_model_are_told() -> None:
    def told(flags: str, world_size: int = 1) -> str:
        return complaint(*flags.split(), world_size=world_size, read_shape=lambda folder: SHAPE)

    boft, fc1 = "--peft-method boft --boft-block-size 8", "decoder.layers.2.mlp.linear_fc1"
    assert "but decoder.layers.0.self_attention.linear_qkv holds 16 in each attention head" in told(boft)
    rank = told(f"--lora-rank 65 --peft-target-modules {fc1}")
    assert f"--lora-rank 65 is above 64, the smaller side of {fc1} (256 x 64)" in rank
    typo = told("--peft-target-modules k_porj")
    assert "k_porj matches no linear layer. There are linear_fc1, linear_fc2, linear_proj, linear_qkv" in typo
    whole = f"{boft} --boft-factors 5 --peft-target-modules linear_fc1"
    parse(*whole.split(), read_shape=lambda folder: SHAPE)  # 128 features
    split = told(f"{whole} --tensor-model-parallel-size 2", world_size=2)
    assert "groups of 128 fit at --tensor-model-parallel-size 1." in split


@pytest.mark.parametrize("rank", ["0", "15"])
@pytest.mark.parametrize(("flags", "code"), [(["--wibble"], 2), (["--help"], 0), (["--version", "--wibble"], 0)])
def test_only_rank_0_speaks_and_all_exit_alike(flags, code, rank, capsys, monkeypatch):
    monkeypatch.setattr("megatron_peft.cli.parser.PATIENCE_SECONDS", 0.01)
    monkeypatch.setenv("RANK", rank)
    assert train.main(flags) == code
    told = "".join(capsys.readouterr())
    assert bool(told) == (rank == "0")
    if told and flags[0] == "--version":
        ours, core, torch = map(metadata.version, ("megatron-peft", "megatron-core", "torch"))
        assert told == f"megatron-peft {ours} (megatron-core {core}, torch {torch})\n"


def test_silent_rank_that_torchrun_ends_exits_with_2_too() -> None:
    """Rank 0 exits first, and torchrun sends SIGTERM to the others, which are waiting by then."""
    code = """
import sys, time
from megatron_peft.commands.train import main
wait = time.sleep
time.sleep = lambda seconds: (print("waiting", flush=True), wait(60))
sys.exit(main(["--wibble"]))
"""
    environ = os.environ | {"RANK": "1"}
    with subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY, env=environ, stdout=subprocess.PIPE) as rank:
        assert rank.stdout is not None and rank.stdout.readline() == b"waiting\n"
        rank.terminate()
        assert rank.wait(timeout=seconds(60)) == 2


def test_help_is_grouped_as_megatrons(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "250")
    assert train.main(["--train-iters", "5", "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    titles = [line[:-1] for line in lines if line.endswith(":") and not line.startswith(" ")]
    expected = "model PEFT data tokenizer training validation checkpointing distributed logging".split()
    expected += ["learning rate", "mixed precision"]
    assert [title for title in expected if title not in titles] == []
    assert max(map(len, lines[lines.index("options:") :])) <= 100
    section = lines[lines.index("PEFT:") : lines.index("data:")]
    assert any("--lora-rank N" in line and "(default: 16)" in line for line in section)


@dataclass(frozen=True)
class OwnSettings:
    prompt_file: str | None = option(None, "the prompts", metavar="FILE")
    top_k: int = option(0, "the likeliest tokens")


def answer(settings: OwnSettings, run_flags: RunFlags) -> int:
    assert settings == OwnSettings("a", 0)
    assert run_flags.words == ["--lr", "1", "--seq-length", "2"]
    assert run_flags.command_line == ["--lr", "1", "--prompt-file", "a", "--seq-length", "2"]
    return 5


COMMAND = Command("p", "What it does.", OwnSettings, answer, takes_run_flags=True)


def test_flags_of_a_command_stand_beside_a_runs(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--lr", "1", "--prompt-file", "a", "--promp", "b"]
    assert COMMAND([*words, "--lora-rank", "4"]) == 2  # no abbreviation
    told = "megatron-peft p: error: --promp is not a known flag; did you mean --prompt-file?\n"
    assert capsys.readouterr().err == told
    assert COMMAND([*words[:4], "--seq-length", "2"]) == 5
    assert COMMAND(["--top-k", "x"]) == 2


@dataclass(frozen=True)
class Listed:
    folders: tuple[str, ...] = option((), "some", flags=("folders",))
    stop: tuple[str, ...] = option((), "texts", append=True)
    loud: bool = option(False, "a switch")
    seed: int = option(1, "a number")


def test_words_without_a_flag_stand_anywhere_and_a_text_with_spaces_is_none_of_them() -> None:
    seen: list[Listed] = []
    command = Command("p", None, Listed, lambda settings: seen.append(settings) or 0)
    assert command(["a", "--loud", "b", "--seed", "3", "c", "--stop", "- x", "-- y", "--seed=-4"]) == 0
    assert seen == [Listed(("a", "b", "c"), ("- x", "-- y"), True, -4)]
    assert (
        RunFlags(["a", "--loud=true"], [*flags_of(Listed)]).problems[0] == "--loud takes no value, but true follows it."
    )
