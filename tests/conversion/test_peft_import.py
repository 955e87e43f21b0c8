"""A LoRA or BOFT of HF PEFT becomes a run that computes the same; what is asked for beyond them is named."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megatron_peft.checkpoint.run_record import RunRecord, read_run_record
from megatron_peft.config import LINEAR_MODULES, ConfigurationError
from megatron_peft.conversion.peft_import import PeftImport, import_adapter, open_import
from megatron_peft.conversion.trained_adapters import open_adapters
from tests.conversion.adapter_runs import EVERY_LLAMA_LINEAR, config_of

LOAD_IT = "Load it with --finetune --peft-method"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
LORA = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]}
BOFT = {"boft_block_size": 4, "target_modules": ["o_proj", "down_proj"]}


@pytest.fixture
def make(moved, tmp_path) -> Callable[..., Path]:
    """Makes an adapter of HF PEFT, LORA or BOFT with changes, with random numbers in the folder `adapter`."""

    def of(kind: dict[str, Any] = LORA, family: str = "short", **changes: Any) -> Path:
        of_peft, part, std = (peft.LoraConfig, "lora_", 0.15) if kind is LORA else (peft.BOFTConfig, "boft_R", 0.3)
        config: Any = of_peft(**{"task_type": "CAUSAL_LM", **kind, **changes})
        model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(moved.base(family)), config)
        torch.manual_seed(5)
        with torch.no_grad():
            for parameter in (p for name, p in model.named_parameters() if part in name):
                parameter.normal_(std=std)
        model.save_pretrained(tmp_path / "adapter")
        return tmp_path / "adapter"

    return of


def imported(adapter: Path, base: Path) -> RunRecord:
    import_adapter(adapter, adapter.parent / "run", pretrained_checkpoint=base)
    return read_run_record(adapter.parent / "run")


def refused(adapter: Path, base: Path | None, told: str) -> None:
    before = [*adapter.parent.iterdir()]
    with pytest.raises(ConfigurationError, match=told):
        import_adapter(adapter, adapter.parent / "run", pretrained_checkpoint=base)
    assert [*adapter.parent.iterdir()] == before


UP_AND_DOWN = r"model\.layers\.[03]\.mlp\.(up|down)_proj"
fc1, fc2 = "decoder.layers.{}.mlp.linear_fc1".format, "decoder.layers.{}.mlp.linear_fc2".format


@pytest.mark.parametrize(
    ("family", "settings", "rank", "targets"),
    [
        ("short", {}, 8, {"linear_qkv"}),
        ("short", {"target_modules": ["k_proj"]}, 4, {"linear_qkv"}),
        ("short", {"target_modules": ["o_proj", "down_proj"]}, 4, {"linear_proj", "linear_fc2"}),
        ("short", {"target_modules": EVERY_LLAMA_LINEAR, "use_rslora": True}, 12, set(LINEAR_MODULES)),
        ("base", {"target_modules": ["up_proj", "gate_proj"], "layers_to_transform": [1, 2]}, 8, {fc1(1), fc1(2)}),
        ("base", {"target_modules": UP_AND_DOWN, "exclude_modules": ["3.mlp.up_proj"]}, 4, {fc1(0), fc2(0), fc2(3)}),
        ("bloom", {"target_modules": ["query_key_value", "dense"]}, 4, {"linear_qkv", "linear_proj"}),
    ],
)
def test_imported_adapter_computes_what_it_does_in_peft(family, settings, rank, targets, moved, make, apart, tmp_path):
    adapter, base = make(LORA, family, **settings), moved.base(family)
    record = imported(adapter, base)
    assert record.config.peft.lora_rank == rank
    assert set(record.config.peft.target_modules) == targets
    assert record.config.peft.lora_scale == pytest.approx(6 / 2 if settings.get("use_rslora") else 6 / 4, rel=1e-12)
    assert apart(tmp_path / "run", adapter).absolute < 1e-4 and apart(tmp_path / "run", base).absolute > 0.1


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"boft_block_num": 8, "boft_block_size": 0, "target_modules": ["down_proj"]},
        {"boft_block_size": 2, "boft_n_butterfly_factor": 3, "layers_to_transform": [1]},
    ],
    ids=["blocks", "number of blocks", "butterfly"],
)
def test_imported_boft_computes_what_it_does_in_peft(settings, moved, make, apart, tmp_path, pure_torch):
    adapter, base = make(BOFT, **settings), moved.base("short")
    imported(adapter, base)
    assert apart(tmp_path / "run", adapter).absolute < 1e-4 and apart(tmp_path / "run", base).absolute > 0.1


def test_pickled_weights_are_read(moved, make, apart, tmp_path):
    adapter = make()
    torch.save(load_file(adapter / WEIGHTS), adapter / "adapter_model.bin")
    (adapter / WEIGHTS).unlink()
    imported(adapter, moved.base("short"))
    assert apart(tmp_path / "run", adapter).absolute < 1e-4


def test_a_run_has_its_own_files_and_is_told_the_flags_to_load_it(moved, make, tmp_path, capsys):
    record = imported(make(), moved.base("short"))
    printed = capsys.readouterr().out
    assert "so the rank is 8 instead of 4; alpha 12 keeps the scale of 1.5." in printed
    assert printed.endswith(f"{LOAD_IT} lora --lora-rank 8 --lora-alpha 12 --peft-target-modules linear_qkv\n")
    assert record.config.peft.lora_alpha == 12
    assert (tmp_path / "run" / "latest_checkpointed_iteration.txt").read_text() == "0\n"
    config = config_of(tmp_path / "run")
    assert config["method"] == "lora" and config["base_model_name_or_path"] == str(moved.base("short"))
    assert config["lora_rank"] == 8 and config["adapted_layers"] == list(record.adapted_layers)
    assert record.position == {"iteration": 0, "consumed_samples": 0, "consumed_tokens": 0}
    assert set(record.base_fingerprint or ()) == {"config.json", "model.safetensors"}
    assert len(record.adapted_layers) == 2


@pytest.mark.parametrize(
    ("settings", "flag"), [({"use_rslora": True}, "--lora-rs"), ({"lora_dropout": 0.25}, "--lora-dropout 0.25")]
)
def test_settings_are_among_the_flags_and_a_rank_that_stays_is_not_mentioned(settings, flag, moved, make, capsys):
    imported(make(target_modules=["o_proj"], **settings), moved.base("short"))
    flags = f"--lora-rank 4 --lora-alpha 6 {flag} --peft-target-modules linear_proj"
    assert capsys.readouterr().out == f"{LOAD_IT} lora {flags}\n"


def test_a_factor_that_was_not_trained_is_told(moved, make, no_extension, capsys):
    adapter = make(BOFT, boft_n_butterfly_factor=2, boft_dropout=0.25, target_modules=["o_proj"])
    capsys.readouterr()
    record = imported(adapter, moved.base("short"))
    factor, dropout, flags = capsys.readouterr().out.splitlines()
    assert factor.startswith("The adapter holds 1 butterfly factor instead of the 2 of its config: HF PEFT trains one")
    assert dropout == "boft_dropout=0.25 is left out: rotations have no dropout here."
    assert flags.startswith(f"{LOAD_IT} boft --boft-block-size 4 --boft-factors 1 --rotation-side input")
    assert record.config.peft.boft_factors == 1


def test_what_pads_the_rank_is_zero(moved, make, tmp_path):
    """o_proj needs rank 4 of the 8 that q_proj and v_proj take together: training leaves the others at zero."""
    imported(make(target_modules=["q_proj", "v_proj", "o_proj"]), moved.base("short"))
    tensors = open_adapters(tmp_path / "run").of("decoder.layers.1.self_attention.linear_proj")
    A, B = tensors["A"], tensors["B"]
    assert A.shape == (8, 120) and B.shape == (96, 8)
    assert A[:4].all() and B[:, :4].all()
    assert not A[4:].any() and not B[:, 4:].any()


LAST_Q = "base_model.model.model.layers.1.self_attn.q_proj.lora_{}.weight"


@pytest.mark.parametrize(
    ("name", "dtype", "told"),
    [
        (LAST_Q.format("B"), None, rf"1 missing: {LAST_Q.format('B')}\."),
        ("base_model.model.lm_head.lora_A.weight", torch.float32, "1 that belong to no targeted layer .*lm_head"),
        (LAST_Q.format("A").replace("q_", "o_"), torch.float32, "1 that belong to no targeted layer .*o_proj.lora_A"),
        (LAST_Q.format("A"), torch.int8, "1 of an unsupported number type: .*q_proj.lora_A.weight I8"),
    ],
)
def test_tensors_that_do_not_fit_are_named(name, dtype, told, moved, make):
    adapter = make()
    weights = load_file(adapter / WEIGHTS)
    weights.pop(name, None)
    if dtype:
        weights[name] = torch.zeros(4, 96, dtype=dtype)
    save_file(weights, adapter / WEIGHTS)
    refused(adapter, moved.base("short"), told)


def only(*modules: str) -> dict[str, Any]:
    return {"target_modules": [*modules]}


@pytest.mark.parametrize(
    ("kind", "settings", "base", "told"),
    [
        (LORA, only("gate_proj"), "small", r"do not fit .*small\. 2 of the wrong shape: .*lora_A.*\[4, 96\] instead"),
        (LORA, only("gate_proj"), "bloom", r"\['gate_proj'\] of .* name no linear layer of --pretrained-.*bloom:"),
        (LORA, {"r": 50}, "short", r"takes --lora-rank 100 instead of 50; but .*linear_qkv has only 96"),
        (BOFT, only("q_proj"), "short", r"q_proj, .*v_proj share an input in .*_qkv and therefore need"),
        (BOFT, only("gate_proj", "up_proj"), "short", r"one for .*gate_proj, .*up_proj, or different ones\. Merge"),
        (BOFT, {"boft_block_size": 0, "boft_block_num": 20}, "short", r"num=20 .* gives blocks of 6 and 8 features; a"),
        (BOFT, {"boft_block_size": 5, **only("down_proj")}, "short", "-block-size is 5; .* use an even size"),
    ],
)
def test_what_has_no_place_in_a_run_is_refused(kind, settings, base, told, moved, make, no_extension):
    refused(make(kind, **settings), moved.base(base), told)


def test_scaled_outputs_are_refused(moved, make, no_extension):
    adapter = make(BOFT)
    tensors, name = load_file(adapter / WEIGHTS), "base_model.model.model.layers.1.mlp.down_proj.boft_s"
    tensors[name][3] = 1.5
    save_file(tensors, adapter / WEIGHTS)
    refused(adapter, moved.base("short"), rf"{name} .* scales output features by 1 to 1\.5; .* Merge it with")


def test_missing_base_and_files_are_named(moved, make, tmp_path):
    adapter, base, bare = make(), moved.base("short"), tmp_path / "bare"
    bare.mkdir()
    shutil.copy(base / "config.json", bare)
    refused(adapter, None, "import-adapter needs --pretrained-checkpoint, the folder")
    refused(adapter, bare, "--pretrained-checkpoint .*bare holds no weights")
    (adapter / WEIGHTS).unlink()
    refused(adapter, base, f"holds neither {WEIGHTS} nor adapter_model.bin")
    (adapter / CONFIG).unlink()
    refused(adapter, base, f"holds no {CONFIG}: give the folder of a HF PEFT adapter")


# Only a plain adapter passes.

PLAIN = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]}
MODULES = [f"model.layers.{layer}.{name}" for layer in (1, 11) for name in ("self_attn.q_proj", "mlp.up_proj")]


def read(folder: Path, **settings: Any) -> PeftImport:
    (folder / CONFIG).write_text(json.dumps({**PLAIN, **settings}))
    return opened(folder)


def opened(folder: Path) -> Any:
    """With weights of no module."""
    save_file({"none": torch.zeros(1)}, folder / WEIGHTS)
    return open_import(folder)


def test_what_peft_itself_writes_is_plain(tmp_path):
    theirs = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj"], use_rslora=True, lora_dropout=0.25)
    theirs.save_pretrained(tmp_path)
    settings = opened(tmp_path)
    assert (settings.rank, settings.alpha, settings.dropout, settings.rank_stabilised) == (8, 16, 0.25, True)
    assert settings.scale == 16 / 8**0.5


UNSUPPORTED = {
    "use_dora": True, "bias": "lora_only", "modules_to_save": ["lm_head"], "rank_pattern": {"q_proj": 4},
    "alpha_pattern": {"q_proj": 4}, "fan_in_fan_out": True, "lora_bias": True, "init_lora_weights": "pissa",
    "task_type": "SEQ_CLS", "of_a_later_version": 3,
}  # fmt: skip
OF_BOFT = {"bias": "boft_only", "fan_in_fan_out": True}
NO_LORA = {"peft_type": "BOFT", "r": None, "lora_alpha": None}
WAY_OUT = r"\. Merge it with HF PEFT"
OTHER_TYPES = ("ADALORA", "IA3", "OFT", "VERA", "PREFIX_TUNING")


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        *(
            ({**kind, name: value}, f"uses unsupported settings: {re.escape(f'{name}={json.dumps(value)}')}{WAY_OUT}")
            for kind, values in (({}, UNSUPPORTED), (NO_LORA, OF_BOFT))
            for name, value in values.items()
        ),
        *(({"peft_type": one}, f"type {one}; only LORA and BOFT can be imported. Merge it") for one in OTHER_TYPES),
        ({"peft_type": None}, "has no peft_type. A run's --save folder needs no import: --load opens it"),
        ({"r": 0}, "r is 0; it must be a whole number above 0"),
        ({"r": 2.5}, "r is 2.5; it must be a whole number"),
        ({"lora_alpha": None}, "lora_alpha is missing"),
        ({"target_modules": None}, "names no target_modules"),
    ],
)
def test_what_is_not_a_plain_lora_is_named_with_the_way_out(settings, told, tmp_path):
    with pytest.raises(ConfigurationError, match=told):
        read(tmp_path, **settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj"]},
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": 1},
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [11], "layers_pattern": "layers"},
        {"target_modules": ["model.layers.1.mlp.up_proj", "11.self_attn.q_proj"]},
        {"target_modules": ["proj"]},
        {"target_modules": r".*\.1\..*"},
        {"target_modules": ["q_proj", "up_proj"], "exclude_modules": ["1.mlp.up_proj"]},
        {"target_modules": ["q_proj", "up_proj"], "exclude_modules": r".*\.11\..*"},
    ],
)
def test_targets_are_those_of_peft(settings, tmp_path):
    ours = read(tmp_path, **settings)
    for module in MODULES:
        assert ours.is_targeted(module) == bool(check_target_module_exists(peft.LoraConfig(**settings), module))
    assert all(map(read(tmp_path, target_modules="all-linear").is_targeted, MODULES))


def test_whole_tensors_are_float32_and_outlive_their_file(tmp_path):
    read(tmp_path)
    stored = {f"{dim}": torch.arange(24.0).reshape(*(1,) * (dim - 1), 24).bfloat16() for dim in (1, 2, 4)}
    save_file({f"base_model.model.q.{name}": tensor for name, tensor in stored.items()}, tmp_path / WEIGHTS)
    adapter = open_import(tmp_path)
    found = {name: adapter.tensor("q", name) for name in stored}
    (tmp_path / WEIGHTS).write_bytes(b"")
    assert all(torch.equal(found[name], stored[name].float()) for name in stored)
