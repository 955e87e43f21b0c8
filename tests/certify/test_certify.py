"""`megatron-peft certify`: small runs keep what their runs are, sound runs pass, and planted faults are named."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cache
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_peft.adapters.quantized_weight import trained_values
from megatron_peft.certify import certify as module
from megatron_peft.certify import converted
from megatron_peft.certify.certify import NOT_CLAIMED, digest_of
from megatron_peft.certify.comparison import CertificateLine, compare_logits, reported_logits
from megatron_peft.certify.runs import Job, run_job, run_jobs
from megatron_peft.commands.certify import main
from megatron_peft.config import CheckpointConfig, ConfigurationError, RunConfig, make_run
from megatron_peft.conversion.verify import random_tokens
from megatron_peft.models.families import config_of_shape, read_shape
from megatron_peft.models.shape import ModelShape, check_quantized
from megatron_peft.rehearsal.requests import make_small
from megatron_peft.runtime.ranks import RanksFailed
from megatron_peft.serving.served import Binding
from tests.certify.faults import FAULTS, NOT_SEEN, Case, Fault, certified
from tests.one_rank import one_rank
from tests.plan.test_recipe_plans import MODELS, WORLDS, recipe
from tests.ranks import run_ranks
from tests.time_limits import seconds

pytestmark = pytest.mark.timeout(seconds(1500))  # the first test of each launch waits for all of its certificates

LLAMA = ModelShape("llama", 16, 2048, 8192, 32, 8, 64, 128256, 131072, tied_embeddings=True)
BLOOM = read_shape(MODELS / "bloomz-7b1")
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
    base = {"pretrained_checkpoint": "not read", "make_vocab_size_divisible_by": 16}
    training = {"train_data_path": ("not-read.jsonl",), "global_batch_size": 8, "train_iters": 100}
    training |= {"overlap_grad_reduce": others.get("overlap_param_gather", False)}
    return make_run(**base, **training, world_size=world_size, **parallel, **peft, **(data or {}), **others)


def test_a_small_run_keeps_the_settings_of_a_step_and_multiplies_all_rates_alike(tmp_path):
    sgd = {"optimizer": "sgd", "sgd_momentum": 0.3, "weight_decay": 0.2, "clip_grad": 0.7}
    rates = {"lr": 1e-4, "decoupled_lr": 2e-4, "adam_beta1": 0.8, "adam_beta2": 0.7, "adam_eps": 1e-3}
    config = run_of({**METHODS["boft"], "peft_lr_rotation": 3e-4}, {}, 2, {"pack_sequences": True}, **sgd, **rates)
    training = replace(config.training, seed=5, grad_reduce_in_bf16=True, overlap_grad_reduce=True)
    data = replace(config.data, packing="next-fit")
    checkpoint = replace(config.checkpoint, save="x", async_save=True)
    config = replace(config, training=training, data=data, checkpoint=checkpoint)
    split = module.small_run(config, LLAMA, tmp_path).split
    kept = {"optimizer": (*sgd, "adam_beta1", "adam_beta2", "adam_eps"), "data": ("packing", "pack_sequences")}
    kept |= {"training": ("seed", "grad_reduce_in_bf16", "overlap_grad_reduce"), "checkpoint": ("async_save",)}
    for part, names in kept.items():
        of_both = [[getattr(getattr(one, part), name) for name in names] for one in (config, split)]
        assert of_both[0] == of_both[1]
    scale = split.optimizer.lr / config.optimizer.lr
    assert split.optimizer.decoupled_lr == pytest.approx(2e-4 * scale)
    assert split.peft.peft_lr_rotation == pytest.approx(3e-4 * scale) and scale != 1


@pytest.mark.parametrize("shape", [LLAMA, BLOOM], ids=["llama", "bloom"])
@pytest.mark.parametrize("method", METHODS)
def test_a_small_model_keeps_the_shape(tmp_path, method, shape):
    config = run_of(METHODS[method], {"tensor_model_parallel_size": 8, "pipeline_model_parallel_size": 5}, 80)
    small = module.small_run(config, shape, tmp_path)
    assert read_shape(tmp_path / "model") == small.shape
    same = ("architecture", "gated_linear_unit", "tied_embeddings", "linear_biases", "embedding_layernorm")
    assert all(getattr(small.shape, name) == getattr(shape, name) for name in same)
    queries = shape.num_attention_heads // shape.num_query_groups
    assert small.shape.num_attention_heads == queries * small.shape.num_query_groups
    parallel = small.split.parallel
    assert (parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size) == (4, 4)
    assert parallel.data_parallel_size == 2 and small.alone.parallel.world_size == 1
    assert small.alone.global_batch_size == small.split.global_batch_size
    assert small.shape.hidden_size < 300


@pytest.mark.parametrize(
    ("given", "num_layers", "expected"),
    [
        ({"num_layers_per_virtual_pipeline_stage": 2}, 48, ({"num_layers_per_virtual_pipeline_stage": 1}, 8)),
        ({"decoder_first_pipeline_num_layers": 3}, 31, ({"decoder_first_pipeline_num_layers": 1}, 7)),
        (
            {"pipeline_model_parallel_layout": "Et|(ttttt|)*6ttL"},
            33,
            ({"pipeline_model_parallel_layout": "Et|t|t|tL"}, 4),
        ),
        ({"pipeline_model_parallel_layout": "E|(tt|)*6ttL"}, 14, ({"pipeline_model_parallel_layout": "E|t|t|tL"}, 3)),
        ({"account_for_loss_in_pipeline_split": True}, 31, ({}, 7)),
        ({}, 32, ({}, 4)),
    ],
)
def test_small_stages_hold_fewer_more_or_none_as_the_runs_do(given, num_layers, expected):
    run = run_of(LORA, {"pipeline_model_parallel_size": 8, **given}, 8)
    changed, layers = expected
    small, shape = make_small(
        run, replace(LLAMA, num_layers=num_layers), module.MOST_TENSOR_PARALLEL, module.MOST_REPLICAS, 8
    )
    assert shape.num_layers == layers
    assert all(getattr(small.parallel, name) == value for name, value in changed.items())


def test_patterns_for_layers_that_are_cut_mean_their_kinds(tmp_path):
    config = run_of({**LORA, "target_modules": ("decoder.layers.9.*qkv", "down_proj")}, {}, 1)
    assert module.small_run(config, LLAMA, tmp_path).split.peft.target_modules == ("linear_qkv", "down_proj")


@pytest.mark.parametrize(("tp", "seq_length"), [(8, 48), (16, 48), (10, 240)])
def test_a_run_of_more_tensor_parallel_ranks_starts_as_many(tmp_path, tp, seq_length):
    shape = replace(LLAMA, num_attention_heads=160, num_query_groups=160)
    layout = {"tensor_model_parallel_size": tp, "sequence_parallel": True, **PP2}
    config = run_of(LORA, layout, 4 * tp, {"seq_length": 720}, bf16=True)
    found = module.wide_run(config, shape, tmp_path)
    assert found is not None and read_shape(tmp_path / "model") == found.shape
    assert module.layout_of(found.split) == f"TP{tp}+SP x PP1 x DP1, bf16"
    assert found.split.data.seq_length == found.alone.data.seq_length == seq_length
    assert module.wide_run(run_of(LORA, {"tensor_model_parallel_size": 4}, 4), shape, tmp_path) is None


def test_what_differs_at_the_runs_own_tensor_parallel_ranks_is_told(tmp_path, monkeypatch):
    config, same = run_at("lora", "TP8+SP"), replace(DIFFERS, problems=())
    wrong = replace(DIFFERS, problems=tuple("abcdefgh"))
    run, wide = module.small_run(config, LLAMA, tmp_path), module.wide_run(config, LLAMA, tmp_path / "wide")
    monkeypatch.setattr(module, "compare_small", lambda one: [wrong if one is wide else same])
    found, differs = module.compare_all(run, wide)
    assert found.name == "losses" and found.passed
    assert differs.name == "losses, at TP8+SP" and differs.problems == (*"abcdef", "and 2 more")


def test_a_method_that_fits_no_small_model_is_an_error(tmp_path):
    config = run_of({**LORA, "lora_rank": 100_000}, {}, 1)
    with pytest.raises(ConfigurationError, match="--lora-rank 100000"):
        module.small_run(config, LLAMA, tmp_path)


@pytest.mark.parametrize("precision", ["nf4", "fp8"])
def test_the_small_model_of_a_quantized_base_has_the_numbers_that_the_run_computes_with(tmp_path, precision):
    config, untied = run_at("lora", "TP8+SP"), replace(LLAMA, tied_embeddings=False)
    model = replace(config.model, base_precision=precision, quantize_output_layer=True)
    small = module.small_run(replace(config, model=model), untied, tmp_path)
    assert small.split.model.base_precision == precision and check_quantized(model, 4, small.shape) == []
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    changed = {
        name
        for name, values in tensors.items()
        if values.dim() == 2 and not torch.allclose(trained_values(values, precision, torch.float32), values, 1e-6, 0)
    }
    assert changed == {"model.embed_tokens.weight"}


# Started for real.

OVERLAPPED = {"use_distributed_optimizer": True, "overlap_param_gather": True}
LAYOUTS: dict[str, tuple[dict[str, Any], int, dict[str, Any]]] = {
    "TP2": (TP2, 2, {}),
    "TP2+SP": ({**TP2, "sequence_parallel": True}, 2, {}),
    "TP8+SP": ({"tensor_model_parallel_size": 8, "sequence_parallel": True}, 8, {}),
    "PP2": (PP2, 2, {}),
    "PP2 interleaved": ({**PP2, "num_layers_per_virtual_pipeline_stage": 1}, 2, {}),
    "DP2": ({}, 2, OVERLAPPED),
    "DP2 plain": ({}, 2, {}),
}


def run_at(method: str, layout: str, bf16: bool = False) -> RunConfig:
    """A run by the names of method and layout; `lora dropout` is another LoRA."""
    parallel, world_size, others = LAYOUTS[layout]
    peft = METHODS.get(method, {**LORA, "lora_dropout": 0.1})
    return run_of(peft, parallel, world_size, bf16=bf16, **others)


def certificates(cases: list[Case]) -> list[Any]:
    (found,) = run_ranks(1, certified, cases, 1500)
    return found


def case_of(fault: Fault) -> Case:
    layout, _, precision = fault.layout.partition(" bf16")
    return Case(run_at(fault.method, layout, layout != fault.layout), LLAMA, fault.broken, fault.line or None)


SOUND = [*product(METHODS, ("TP2+SP", "PP2 interleaved", "DP2"), (False, True))]
SOUND += [("hybrid", "TP8+SP", False), ("lora-ga", "TP8+SP", True)]
CASES = {one: Case(run_at(*one), LLAMA) for one in SOUND} | {one.what: case_of(one) for one in FAULTS}
# In `make test`, where `training/test_layout.py` has other layouts; all of them in `make test-all`.
QUICK: list[Any] = [
    *(("lora", "TP2+SP", True), ("boft", "DP2", True)),
    *("a sum over tensor ranks is missing", "each rank draws factors of its own"),
]
OTHER_FAULTS = [one for one in FAULTS if one.what not in QUICK]
RECIPES = {**WORLDS, "laptop-cpu": 3}


def marked(cases: Sequence[Any], names: Sequence[Any]) -> list[Any]:
    """Cases for a test, by their names."""
    marks = (() if name in QUICK else pytest.mark.slow for name in names)
    return [pytest.param(one, id=str(name), marks=mark) for one, name, mark in zip(cases, names, marks, strict=True)]


def launched(name: Any) -> Any:
    """A certificate, or the lines of one with a fault: quick ones out of one launch, other sound ones, other faults."""
    others = [one for one in CASES if one not in QUICK and (one in SOUND) == (name in SOUND)]
    return _launched(tuple(QUICK if name in QUICK else others))[name]


@cache
def _launched(names: Sequence[Any]) -> dict[Any, Any]:
    return dict(zip(names, certificates([CASES[name] for name in names]), strict=True))


def problems_of(certificate: Any) -> dict[str, tuple[str, ...]]:
    return {one.name: one.problems or (one.error,) for one in certificate.comparisons if not one.passed}


def refuses(lines: list[CertificateLine], fault: Fault) -> bool:
    return any(fault.named in problem for one in lines if one.name == fault.line for problem in one.problems)


@pytest.mark.parametrize("case", marked(SOUND, SOUND))
def test_a_sound_run_is_certified(case):
    certificate = launched(case)
    assert problems_of(certificate) == {} and certificate.verdict == "CERTIFIED"


@pytest.mark.slow
@pytest.mark.parametrize(("method", "precision"), [("lora", "nf4"), ("hybrid", "fp8")])
def test_a_sound_run_on_a_quantized_base_is_certified(method, precision):
    config = run_at(method, "TP2+SP")
    model = replace(config.model, base_precision=precision, quantize_output_layer=precision == "nf4")
    (one,) = certificates([Case(replace(config, model=model), replace(LLAMA, tied_embeddings=False))])
    assert problems_of(one) == {} and one.verdict == "CERTIFIED"


@pytest.mark.parametrize("fault", marked(FAULTS, [one.what for one in FAULTS]))
def test_a_fault_is_refused_by_name(fault):
    assert refuses(launched(fault.what), fault), launched(fault.what)


@pytest.mark.slow
def test_directions_that_rounding_exchanges_are_no_difference():
    """Two leading directions of a gradient of this model are nearly as strong as one another."""
    shape = replace(LLAMA, num_layers=4, hidden_size=96, ffn_hidden_size=192, vocab_size=512)
    shape = replace(shape, num_attention_heads=6, num_query_groups=2, kv_channels=16)
    peft = {"method": "lora-ga", "lora_rank": 4, "lora_max_norm_ratio": 0.5}
    (one,) = certificates([Case(run_of(peft, {**TP2, **PP2, "sequence_parallel": True}, 4, bf16=True), shape)])
    assert problems_of(one) == {} and one.verdict == "CERTIFIED"


@pytest.mark.slow
def test_every_recipe_is_certified():
    every = certificates([Case(*recipe(name, [], RECIPES)) for name in RECIPES])
    assert [problems_of(one) for one in every] == [{} for _ in RECIPES]


@pytest.mark.parametrize("fault", [*FAULTS, *NOT_SEEN], ids=lambda fault: fault.what)
def test_every_fault_can_be_planted(fault):
    """Its text stands once."""
    assert Path(str(import_module(fault.broken.module).__file__)).read_text().count(fault.broken.old) == 1


@pytest.mark.slow
def test_what_is_not_seen_is_what_the_certificate_says(capsys):
    for fault, one in zip(NOT_SEEN, certificates(list(map(case_of, NOT_SEEN))), strict=True):
        assert problems_of(one) == {} and fault.kind in NOT_CLAIMED, fault
    counts = Counter(one.kind for one in OTHER_FAULTS if refuses(launched(one.what), one))
    with capsys.disabled():
        print(f"\nplanted faults that were refused by name: {counts.total()} of {len(OTHER_FAULTS)}, {dict(counts)}")


def certificate_of(tmp_path: Path, *flags: str, shape: ModelShape = LLAMA, expected: int = 0) -> dict:
    (tmp_path / "config.json").write_text(json.dumps(config_of_shape(shape)))
    output = tmp_path / "certificate.json"
    common = ["--pretrained-checkpoint", str(tmp_path / "config.json"), "--train-data-path", "not-read.jsonl"]
    assert main(["--train-iters", "100", "--output", str(output), *common, *flags]) == expected
    return json.loads(output.read_text())


def test_a_certificate_is_printed_and_written(tmp_path, capsys, monkeypatch):
    certificate = launched(QUICK[0])
    monkeypatch.setattr(module, "certify", lambda *given: certificate)
    content = certificate_of(tmp_path)
    names = {one["name"]: one for one in content["comparisons"]}
    assert content["passed"] and all(one["passed"] and one["num_compared"] for one in names.values())
    assert {"losses", "trained tensors", "resumed run", "merged model in transformers"} <= names.keys()
    assert "exported adapter in Hugging Face PEFT" in names
    assert content["small_flags"]["data"]["train_data_path"] == ["SMALL/data.jsonl"]
    assert content["small_flags"]["checkpoint"]["save"] == "SMALL/split"
    assert content["digest"] == digest_of(content)
    assert content["digest"] != digest_of({**content, "passed": False})
    printed = capsys.readouterr().out
    assert "CERTIFIED" in printed and content["digest"] in printed and "dropout" in printed


DIFFERS = CertificateLine("losses", 4, 1.0, 1e-5, ("step 1: 2, in one process 1",))
FAILED = module.failed("merge and export", RanksFailed("--- rank 0\nTraceback\nValueError: no such heads\n"))


@pytest.mark.parametrize(
    ("lines", "verdict", "code"),
    [((DIFFERS,), "REFUSED", 1), ((FAILED,), "UNDECIDED", 3), ((FAILED, DIFFERS), "REFUSED", 1)],
)
def test_an_error_is_told_apart_from_a_difference(tmp_path, capsys, monkeypatch, lines, verdict, code):
    certificate = module.Certificate("TP1", "TP1", lines, NOT_CLAIMED, {}, {}, {}, {}, asdict(LLAMA))
    runs: list[RunConfig] = []
    monkeypatch.setattr(module, "certify", lambda config, *_: runs.append(config) or certificate)
    content = certificate_of(tmp_path, "--nproc-per-node", "4", expected=code)
    assert runs[0].parallel.world_size == 4
    assert content["verdict"] == verdict and not content["passed"]
    printed = capsys.readouterr().out
    assert verdict in printed and ("ValueError: no such heads" in printed) is (FAILED in lines)


def test_a_method_that_cannot_be_merged_is_certified_without_that(monkeypatch, tmp_path):
    """Nor exported: neither is an error of the tool, or of the run."""

    def refuse(run, output, **_):
        raise ConfigurationError(f"--input {run}: adapters of --peft-method gains cannot be merged.")

    for name in ("merge", "export_adapter"):
        monkeypatch.setattr(converted, name, refuse)
    config = run_of(LORA, {}, 1)
    config = replace(config, checkpoint=replace(config.checkpoint, save=str(tmp_path / "split")))
    lines = converted.compare_converted((config, torch.zeros(2, 4), (torch.zeros(1), torch.ones(1))))
    told = "not compared (adapters of --peft-method gains cannot be merged)"
    assert [(one.note, one.passed, one.num_compared) for one in lines] == [(told, True, 0)] * 2


def test_full_fine_tuning_is_converted_and_exports_no_adapter(monkeypatch, tmp_path):
    tokens, logits = torch.zeros(2, 4), (torch.zeros(1), torch.ones(1))
    monkeypatch.setattr(converted, "megatron_to_hf", lambda run, output, **_: output)
    monkeypatch.setattr(converted.verify, "logits_of", lambda folder, _: logits[1] if folder.name == "merged" else None)
    config = run_of(METHODS["full"], {}, 1)
    config = replace(config, checkpoint=replace(config.checkpoint, save=str(tmp_path / "split")))
    [line] = converted.compare_converted((config, tokens, logits))
    assert line.name == "merged model in transformers" and line.passed and line.num_compared == 1


def test_what_an_engine_does_not_bind_or_computes_otherwise_is_refused(monkeypatch, tmp_path):
    """A real engine serves certificates in tests/serving."""
    (tmp_path / "merged").mkdir()
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"r": 4}')
    logits = torch.zeros(2, 20, 8), torch.randn(2, 20, 8)
    right = converted.after_prefixes(logits[1])
    answers = {"merged": right, "adapter of ranks up to 8": right, "adapter of ranks up to 16": right + 0.01}

    def served(python, model, adapters, tokens, limit):
        assert (model.name == "merged") is (adapters == [])
        name = f"adapter of ranks up to {limit}" if adapters else "merged"
        return ("vLLM 1", right - 1, answers[name]) if adapters else ("vLLM 1", answers[name])

    monkeypatch.setattr(converted, "served_log_probs", served)
    monkeypatch.setattr(converted, "export_lora", lambda *_: tmp_path / "adapter")
    monkeypatch.setattr(converted, "bindings_of", lambda *_: [Binding("vLLM 1", 13, 4, ("missing: o_proj",))])
    config = run_of(LORA, {}, 1)
    config = replace(config, checkpoint=replace(config.checkpoint, save=str(tmp_path / "split")))
    lines = [*converted.compare_in_engine(Path("python"), config, torch.zeros(2, 20), logits)]
    assert [(one.name, one.passed, one.num_compared) for one in lines] == [
        ("merged model in vLLM 1", True, 64),
        ("modules bound by vLLM 1", False, 13),
        ("adapter of ranks up to 8 in vLLM 1", True, 64),
        ("adapter of ranks up to 16 in vLLM 1", False, 64),
    ]


def test_an_engine_that_fails_at_the_adapter_leaves_the_certificate_undecided(monkeypatch, tmp_path):
    def failed(*_):
        raise ConfigurationError("vLLM failed (it ended with exit code 139).")

    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"r": 400}')
    monkeypatch.setattr(converted, "export_lora", lambda *_: tmp_path / "adapter")
    monkeypatch.setattr(converted, "bindings_of", failed)
    config = run_of(LORA, {}, 1)
    config = replace(config, checkpoint=replace(config.checkpoint, save=str(tmp_path / "split")))
    logits = torch.zeros(2, 20, 8), torch.randn(2, 20, 8)
    (line,) = converted.compare_in_engine(Path("python"), config, torch.zeros(2, 20), logits)
    assert line.error == "vLLM failed (it ended with exit code 139)." and not line.passed
    monkeypatch.setattr(converted, "bindings_of", lambda *_: [Binding("vLLM 1", 14, 400, ())])
    monkeypatch.setattr(converted, "served_log_probs", lambda *_: ("vLLM 1", converted.after_prefixes(logits[1])))
    lines = converted.compare_in_engine(Path("python"), config, torch.zeros(2, 20), logits)
    assert [one.name for one in lines][1:] == ["adapter of ranks up to 512 in vLLM 1"]  # there is no higher limit


@pytest.mark.parametrize("heads", [1, 3, 6, 9, 14, 28, 40])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_transformers_takes_the_small_model_of_any_number_of_heads(family, heads):
    from transformers import AutoConfig

    shape = replace(LLAMA, architecture=family, num_attention_heads=heads, num_query_groups=1, hidden_size=16 * heads)
    for tp in (1, 2):
        found = module.small_shape(shape, run_of(LORA, {"tensor_model_parallel_size": tp}, tp), tp, 2)
        AutoConfig.for_model(**config_of_shape(found)).validate()
        assert found.hidden_size % found.num_attention_heads == 0


# What is wrong with the flags.


def told(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    assert main(list(flags)) == 2
    return capsys.readouterr().err


def test_wrong_flags_are_named(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(config_of_shape(LLAMA)))
    run = ["--pretrained-checkpoint", str(tmp_path), "--train-data-path", "x.jsonl", "--train-iters", "1"]
    # --save is not needed for --save-interval: nothing is saved, as in a plan.
    layout = ["--world-size", "6", "--tensor-model-parallel-size", "4", "--save-interval", "200"]
    error = told(capsys, *run, *layout)
    assert error.count("error:") == 1 and "6 processes cannot hold --tensor-model-parallel-size 4" in error
    assert "--save" not in error
    assert "--world-size is 0; it must be above 0" in told(capsys, *run, "--world-size", "0")
    (tmp_path / "there.json").touch()
    error = told(capsys, *run, "--output", str(tmp_path / "there.json"))
    assert "there.json exists already" in error and (tmp_path / "there.json").read_text() == ""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba", "architectures": ["Mamba"]}))
    error = told(capsys, *run)
    assert "'mamba', which is not supported" in error and "docs/new-model.md adds a family" in error


def test_logits_of_a_pipeline_are_those_of_one_process(tmp_path):
    small = module.small_run(run_at("lora", "PP2 interleaved"), LLAMA, tmp_path)
    tokens = random_tokens(small.shape.vocab_size, small.split.data.seq_length)
    split = replace(small.split, checkpoint=CheckpointConfig())
    ranks = [reports[0] for reports in run_ranks(2, run_jobs, [Job(split, small.shape, tokens)])]
    assert [rank.logits is None for rank in ranks] == [True, False], "the last stage has them"
    with one_rank(with_groups=False):
        alone = run_job(Job(small.alone, small.shape, tokens))
    for index in (0, 1):
        assert compare_logits("", reported_logits(ranks)[index], alone.logits, index, False).passed
