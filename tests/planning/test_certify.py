"""`megatron-peft certify`: small runs keep what their runs are, a sound product passes, and six faults are named."""

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from megatron_peft.commands.certify import main
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
)
from megatron_peft.conversion.verify import random_tokens
from megatron_peft.models.families import config_of_shape, read_shape
from megatron_peft.models.shape import ModelShape
from megatron_peft.planning import small_run as small
from megatron_peft.planning.certified_ranks import Job, RankReport, train_alone, train_split
from megatron_peft.planning.certify import certify, digest_of
from megatron_peft.planning.comparison import compare_runs
from tests.planning.faults import FAULTS, NOT_SEEN, Fault
from tests.planning.warm import Case, certified
from tests.ranks import run_ranks

LLAMA = ModelShape("llama", 16, 2048, 8192, 32, 8, 64, 128256, 131072, tied_embeddings=True)
BLOOM = ModelShape(
    *("bloom", 30, 4096, 16384, 32, 32, 128, 250880, 2048),
    normalization="LayerNorm",
    gated_linear_unit=False,
    activation="gelu_tanh",
    linear_biases=frozenset({"linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"}),
    tied_embeddings=True,
    position_embedding="alibi",
    embedding_layernorm=True,
)
TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
LORA = {"method": "lora", "lora_rank": 4}
BOFT = {"method": "boft", "boft_block_size": 4, "boft_factors": 2}
METHODS: dict[str, dict[str, Any]] = {
    "full": {"method": "full"},
    "lora": LORA,
    "lora-ga": {"method": "lora-ga", "lora_rank": 4, "lora_ga_init": "paper"},
    "boft": {**BOFT, "rotation_side": "input", "boft_factors": 1},
    "urnn": {"method": "urnn", "urnn_block_size": 8},
    "hybrid": {**BOFT, "method": "hybrid", "lora_rank": 4},
}


def run_of(
    peft: dict[str, Any], parallel: dict[str, Any], world_size: int, data: dict[str, Any] | None = None, **others: Any
) -> RunConfig:
    """A run of eight samples a step."""
    overlaps = others.get("overlap_param_gather", False)
    return RunConfig(
        parallel=ParallelConfig(**parallel, world_size=world_size),
        model=ModelConfig("not read", bf16=others.pop("bf16", False), make_vocab_size_divisible_by=16),
        peft=PeftConfig(**peft),
        data=DataConfig(train_data_path=("not-read.jsonl",), **(data or {})),
        training=TrainingConfig(global_batch_size=8, train_iters=100, overlap_grad_reduce=overlaps),
        optimizer=OptimizerSettings(**others),
    )


@pytest.mark.parametrize("shape", [LLAMA, BLOOM], ids=["llama", "bloom"])
@pytest.mark.parametrize("method", METHODS)
def test_a_small_model_keeps_the_shape(tmp_path, method, shape):
    config = run_of(METHODS[method], {"tensor_model_parallel_size": 8, "pipeline_model_parallel_size": 5}, 80)
    found = small.small_run(config, shape, tmp_path)
    assert read_shape(tmp_path / "model") == found.shape
    same = ("architecture", "gated_linear_unit", "tied_embeddings", "linear_biases", "embedding_layernorm")
    assert all(getattr(found.shape, name) == getattr(shape, name) for name in same)
    queries = shape.num_attention_heads // shape.num_query_groups
    assert found.shape.num_attention_heads == queries * found.shape.num_query_groups
    parallel = found.split.parallel
    assert (parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size) == (4, 4)
    assert parallel.data_parallel_size == 2 and found.alone.parallel.world_size == 1
    assert found.alone.global_batch_size == found.split.global_batch_size
    assert found.shape.hidden_size < 300


@pytest.mark.parametrize(
    ("given", "num_layers", "expected"),
    [
        ({"num_layers_per_virtual_pipeline_stage": 2}, 48, ({"num_layers_per_virtual_pipeline_stage": 1}, 8)),
        ({"decoder_first_pipeline_num_layers": 3}, 31, ({"decoder_first_pipeline_num_layers": 1}, 7)),
        ({"pipeline_model_parallel_layout": "E|(tt|)*6ttL"}, 14, ({"pipeline_model_parallel_layout": "E|t|t|tL"}, 3)),
        ({"account_for_loss_in_pipeline_split": True}, 31, ({}, 7)),
        ({}, 32, ({}, 4)),
    ],
)
def test_small_stages_hold_fewer_more_or_none_as_the_runs_do(given, num_layers, expected):
    run = ParallelConfig(pipeline_model_parallel_size=8, world_size=8, **given)
    changed, layers = expected
    parallel, found = small.small_layout(run, num_layers)
    assert found == layers and all(getattr(parallel, name) == value for name, value in changed.items())


def test_patterns_for_layers_that_are_cut_mean_their_kinds(tmp_path):
    config = run_of({**LORA, "target_modules": ("decoder.layers.9.*qkv", "down_proj")}, {}, 1)
    assert small.small_run(config, LLAMA, tmp_path).split.peft.target_modules == ("linear_qkv", "down_proj")


def test_a_method_that_fits_no_small_model_is_an_error(tmp_path):
    config = run_of({**LORA, "lora_rank": 100_000}, {}, 1)
    with pytest.raises(ConfigurationError, match="--lora-rank 100000"):
        small.small_run(config, LLAMA, tmp_path)


# Started for real.

OVERLAPPED = {"use_distributed_optimizer": True, "overlap_param_gather": True}
LAYOUTS: dict[str, tuple[dict[str, Any], int, dict[str, Any]]] = {
    "TP2": (TP2, 2, {}),
    "TP2+SP": ({**TP2, "sequence_parallel": True}, 2, {}),
    "PP2": (PP2, 2, {}),
    "PP2 interleaved": ({**PP2, "num_layers_per_virtual_pipeline_stage": 1}, 2, {}),
    "DP2": ({}, 2, OVERLAPPED),
}


def run_at(method: str, layout: str, bf16: bool = False) -> RunConfig:
    """A run by the names of method and layout."""
    parallel, world_size, others = LAYOUTS[layout]
    return run_of(METHODS[method], parallel, world_size, bf16=bf16, **others)


def certificates(cases: list[Case]) -> list[Any]:
    (found,) = run_ranks(1, certified, cases, 1500)
    return found


def problems_of(certificate: Any) -> dict[str, tuple[str, ...]]:
    return {one.name: one.problems or (one.error,) for one in certificate.comparisons if not one.passed}


# One of each kind in `make test`; all of them in `make test-all`.
QUICK = [("lora", "TP2+SP", True), ("full", "PP2 interleaved", False), ("boft", "DP2", True)]
SPLITS = ("TP2+SP", "PP2 interleaved", "DP2")
ALL = [case for case in product(METHODS, SPLITS, (False, True)) if case not in QUICK]


@pytest.fixture(scope="module")
def quick() -> dict[Any, Any]:
    return dict(zip(QUICK, certificates([Case(run_at(*one), LLAMA) for one in QUICK]), strict=True))


@pytest.fixture(scope="module")
def all_others() -> dict[Any, Any]:
    return dict(zip(ALL, certificates([Case(run_at(*one), LLAMA) for one in ALL]), strict=True))


@pytest.mark.parametrize("case", QUICK, ids=str)
def test_a_sound_run_is_certified(quick, case):
    assert problems_of(quick[case]) == {} and quick[case].verdict == "CERTIFIED"


@pytest.mark.slow
@pytest.mark.parametrize("case", ALL, ids=str)
def test_every_sound_run_is_certified(all_others, case):
    assert problems_of(all_others[case]) == {} and all_others[case].verdict == "CERTIFIED"


# What is wrong with the flags.


def told(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(list(flags))
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_wrong_flags_are_named(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(config_of_shape(LLAMA)))
    run = ["--pretrained-checkpoint", str(tmp_path), "--train-data-path", "x.jsonl", "--train-iters", "1"]
    error = told(capsys, *run, "--world-size", "6", "--tensor-model-parallel-size", "4")
    assert "6 processes cannot hold --tensor-model-parallel-size 4" in error
    assert "--world-size is 0; it must be above 0" in told(capsys, *run, "--world-size", "0")
    (tmp_path / "there.json").touch()
    error = told(capsys, *run, "--output", str(tmp_path / "there.json"))
    assert "there.json exists already" in error and (tmp_path / "there.json").read_text() == ""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba", "architectures": ["Mamba"]}))
    assert "'mamba', which is not supported" in told(capsys, *run)
