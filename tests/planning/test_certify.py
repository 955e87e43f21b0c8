"""`megatron-peft certify`: small runs keep what their runs are, a sound product passes, and six faults are named."""

import json
from dataclasses import replace
from functools import cache
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
from tests.planning import faults
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
    return RunConfig(
        parallel=ParallelConfig(**parallel, world_size=world_size),
        model=ModelConfig("not read", bf16=others.pop("bf16", False), make_vocab_size_divisible_by=16),
        peft=PeftConfig(**peft),
        data=DataConfig(train_data_path=("not-read.jsonl",), **(data or {})),
        training=TrainingConfig(global_batch_size=8, train_iters=100),
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


class Runs:
    """Small runs in a layout, with a fault, beside their run in one process, which all faults share."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._alone = cache(self._alone)

    def _alone(self, method: str, layout: str) -> tuple[Job, Job, RankReport]:
        """The runs in a layout and in one process, and what the second finds."""
        parallel, world_size = LAYOUTS[layout]
        folder = self._folder / f"{method} {layout}"
        folder.mkdir()
        found = small.small_run(run_of(METHODS[method], parallel, world_size), LLAMA, folder)
        tokens = random_tokens(found.shape.vocab_size, small.SEQ_LENGTH)
        split, alone = (Job(config, found.shape, tokens) for config in (found.split, found.alone))
        ((reference, _),) = run_ranks(1, train_alone, (alone, None), 600)
        return split, alone, reference

    def problems(self, fault: str, method: str, layout: str) -> dict[str, tuple[str, ...]]:
        """By what was compared."""
        sound, alone, reference = self._alone(method, layout)
        save = CheckpointConfig(save=f"{sound.config.checkpoint.save}-{fault}")
        job = replace(sound, config=replace(sound.config, checkpoint=save), plant=getattr(faults, fault))
        ranks: list[RankReport] = run_ranks(job.config.parallel.world_size, train_split, job, 600)
        found = compare_runs((job, ranks), (alone, reference))
        return {one.name: one.problems for one in found if not one.passed}


LAYOUTS = {"TP2": (TP2, 2), "PP2": (PP2, 2), "DP2": ({}, 2)}
# Fault, method, layout, and: what is compared first that differs, and a name in it.
FAULTS = [
    ("sum_left_out", "lora", "TP2", "gradients of step 1", "self_attention.linear_proj.adapter.B"),
    ("wrong_seed", "lora", "TP2", "copies on several ranks, at the start", "self_attention.linear_qkv.adapter.A"),
    ("sum_doubled", "lora", "TP2", "gradients of step 1", "mlp.linear_fc2.adapter.B"),
    ("gate_and_up_mixed", "lora", "TP2", "gradients of step 1", "mlp.linear_fc1.adapter.B"),
    ("tied_head_forgotten", "full", "PP2", "gradients of step 1", "embedding.word_embeddings.weight"),
    ("one_ranks_data", "lora", "DP2", "samples of each step", "replica 1"),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    return Runs(tmp_path_factory.mktemp("certify"))


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "method", "layout", "compared", "named"), FAULTS, ids=[case[0] for case in FAULTS])
def test_a_fault_is_refused_by_name(runs, fault, method, layout, compared, named):
    problems = runs.problems(fault, method, layout)
    assert compared in problems, problems
    assert any(named in problem for problem in problems[compared]), problems[compared]


def certificate_of(tmp_path: Path, *flags: str, world_size: int, shape: ModelShape = LLAMA, expected: int = 0) -> dict:
    (tmp_path / "config.json").write_text(json.dumps(config_of_shape(shape)))
    output = tmp_path / "certificate.json"
    common = ["--pretrained-checkpoint", str(tmp_path / "config.json"), "--train-data-path", "not-read.jsonl"]
    lengths = ["--train-iters", "100", "--global-batch-size", "8", "--make-vocab-size-divisible-by", "16"]
    own = ["--world-size", str(world_size), "--output", str(output)]
    assert main([*own, *common, *lengths, *flags]) == expected
    return json.loads(output.read_text())


def test_a_sound_run_gets_a_certificate(tmp_path, capsys):
    found = certificate_of(
        *(tmp_path, "--tensor-model-parallel-size", "2", "--sequence-parallel", "--lora-rank", "4"), world_size=2
    )
    names = {one["name"]: one for one in found["comparisons"]}
    assert found["passed"] and all(one["passed"] and one["num_compared"] for one in names.values())
    assert {"losses", "trained tensors", "resumed run", "merged model in transformers"} <= names.keys()
    assert {"exported adapter in Hugging Face PEFT", "adapted layers at TP2+SP, in one process"} <= names.keys()
    assert found["digest"] == digest_of(found)
    assert found["digest"] != digest_of({**found, "passed": False})
    printed = capsys.readouterr().out
    assert "CERTIFIED" in printed and found["digest"] in printed


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_certified_at_all_splits_at_once(tmp_path, method):
    parallel = {**TP2, **PP2, "sequence_parallel": True}
    config = run_of(METHODS[method], parallel, 8, {"pack_sequences": True}, use_distributed_optimizer=True)
    certificate = certify(config, LLAMA)
    problems = {one.name: one.problems for one in certificate.comparisons if not one.passed}
    assert problems == {}


@pytest.mark.slow
def test_a_faulty_run_is_refused_by_the_command(tmp_path, monkeypatch):
    from megatron_peft.planning import certify as module

    whole = module.certify
    monkeypatch.setattr(module, "certify", lambda config, shape: whole(config, shape, faults.sum_doubled))
    flags = ["--tensor-model-parallel-size", "2", "--lora-rank", "4"]
    found = certificate_of(tmp_path, *flags, world_size=2, expected=1)
    assert not found["passed"]


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
