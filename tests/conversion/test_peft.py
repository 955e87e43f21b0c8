"""HF PEFT opens an exported LoRA, and one that it made is opened here: both compute what the other side does."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megatron_peft.checkpoint.run_record import RunRecord, read_run_record
from megatron_peft.config import LINEAR_MODULES, ConfigurationError, ModelConfig, PeftConfig
from megatron_peft.conversion.convert import hf_to_megatron
from megatron_peft.conversion.peft_export import export_adapter, export_as_lora
from megatron_peft.conversion.peft_import import import_adapter
from megatron_peft.conversion.trained_adapters import open_adapters
from megatron_peft.conversion.verify import verify
from tests.conversion.adapter_runs import copy_run, trained_on, with_config

LOAD_IT = "Load it with --finetune --peft-method lora"
EVERY_LLAMA_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SOME = {f"model.layers.{layer}.mlp.{part}_proj" for layer in (1, 2) for part in ("gate", "up")}
TARGETS = {
    "tp2": set(EVERY_LLAMA_LINEAR),
    "pp2": {"down_proj", *SOME, *(f"model.layers.3.self_attn.{part}_proj" for part in "qkv")},
    "bloom": {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"},
    "paper": set(EVERY_LLAMA_LINEAR),
}


def config_of(adapter: Path) -> dict[str, Any]:
    return json.loads((adapter / "adapter_config.json").read_text())


def check_that_peft_finds_every_tensor(adapter: Path, base: Path | str) -> None:
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter))
    loaded, exported = peft.get_peft_model_state_dict(model), load_file(adapter / "adapter_model.safetensors")
    assert loaded.keys() == exported.keys()
    assert all(torch.equal(loaded[name], exported[name]) for name in exported)


@pytest.mark.parametrize("run", TARGETS)
def test_peft_computes_what_the_adapted_model_does(run, moved, tmp_path):
    base = read_run_record(moved.run(run)).config.model.pretrained_checkpoint
    adapter = export_adapter(moved.run(run), tmp_path / "adapter")
    assert set(config_of(adapter)["target_modules"]) == TARGETS[run]
    assert config_of(adapter)["base_model_name_or_path"] == base
    assert verify(adapter, moved.run(run)).logits.absolute < 1e-4
    assert verify(adapter, base).logits.absolute > 0.1
    check_that_peft_finds_every_tensor(adapter, base)


@pytest.mark.parametrize("stabilised", [True, False])
def test_a_start_that_is_subtracted_doubles_the_rank_and_keeps_the_scale(stabilised, moved, tmp_path):
    """The run has rank 4 and alpha 3."""
    settings = replace(read_run_record(moved.run("paper")).config.peft, lora_rs=stabilised)
    export_adapter(copy_run(moved.run("paper"), tmp_path / "run", with_config(peft=settings)), tmp_path / "adapter")
    config = config_of(tmp_path / "adapter")
    assert config["r"] == 8 and config["use_rslora"] is stabilised
    assert config["lora_alpha"] == pytest.approx(3 * 2**0.5 if stabilised else 6, rel=1e-12)


@pytest.mark.parametrize("run", ["urnn", "hybrid"])
def test_methods_that_peft_does_not_have_are_refused(run, moved, tmp_path):
    with pytest.raises(ConfigurationError, match=rf"has no equivalent of --peft-method {run}.*merge"):
        export_adapter(moved.run(run), tmp_path / "adapter")
    assert not list(tmp_path.iterdir())


def test_base_may_be_elsewhere(moved, tmp_path):
    """Its weights are not needed; a base that is given is compared with the one that was trained on."""
    elsewhere = with_config(model=ModelConfig(pretrained_checkpoint="far/away"))
    run = copy_run(moved.run("tp2"), tmp_path / "run", elsewhere)
    export_adapter(run, tmp_path / "without")
    assert config_of(tmp_path / "without")["base_model_name_or_path"] == "far/away"
    with pytest.raises(ConfigurationError, match=r"trained on the base model far/away, but .*other is another one"):
        export_adapter(run, tmp_path / "with", pretrained_checkpoint=moved.base("other"))


def test_a_base_of_the_hub_has_its_name_there_in_plain_and_approximate_adapters(moved, tmp_path, monkeypatch):
    """The folder of this machine's cache means nothing elsewhere."""
    snapshot = tmp_path / "hub" / "models--org--base" / "snapshots" / "0e9e39f249a16976918f6564b8830bc894c89659"
    shutil.copytree(moved.base("base"), snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text(snapshot.name)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    run = trained_on(moved.run("tp2"), tmp_path / "run", snapshot)
    export_adapter(run, tmp_path / "plain")
    export_as_lora(run, tmp_path / "approximate", progress=False)
    for folder in ("plain", "approximate"):
        assert config_of(tmp_path / folder)["base_model_name_or_path"] == "org/base"
        assert verify(tmp_path / folder, run).logits.absolute < 1e-4  # which finds it there


def test_base_in_megatrons_form_is_not_named_and_that_is_said(moved, tmp_path, capsys):
    base = hf_to_megatron(moved.base("base"), tmp_path / "base", progress=False)
    export_adapter(trained_on(moved.run("tp2"), tmp_path / "run", base), tmp_path / "out")
    assert config_of(tmp_path / "out")["base_model_name_or_path"] is None
    assert f"The base model {base} is in Megatron's form, which HF PEFT does not open" in capsys.readouterr().out
    card = (tmp_path / "out" / "README.md").read_text()
    assert "vllm serve HUGGING_FACE_BASE --enable-lora" in card and "base_model:" not in card


def test_full_fine_tuning_has_no_adapter(moved, tmp_path):
    run = copy_run(moved.run("tp2"), tmp_path / "run", with_config(peft=PeftConfig(method="full")))
    with pytest.raises(ConfigurationError, match=r"run of full fine-tuning and holds no adapters: .* megatron-to-hf"):
        export_adapter(run, tmp_path / "adapter")


def make_peft_adapter(base: Path, folder: Path, config: peft.PeftConfig, part: str, std: float) -> Path:
    """An adapter of HF PEFT with random numbers where a name has `part`."""
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in (p for name, p in model.named_parameters() if part in name):
            parameter.normal_(std=std)
    model.save_pretrained(folder)
    return folder


def make_adapter(base: Path, folder: Path, **settings: Any) -> Path:
    config = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **settings}
    return make_peft_adapter(base, folder, peft.LoraConfig(**config), "lora_", 0.15)


@pytest.fixture
def adapter(moved, tmp_path):
    return make_adapter(moved.base("base"), tmp_path / "adapter")


def imported(adapter: Path, base: Path) -> RunRecord:
    import_adapter(adapter, adapter.parent / "run", pretrained_checkpoint=base)
    return read_run_record(adapter.parent / "run")


UP_AND_DOWN = r"model\.layers\.[03]\.mlp\.(up|down)_proj"
fc1, fc2 = "decoder.layers.{}.mlp.linear_fc1".format, "decoder.layers.{}.mlp.linear_fc2".format


@pytest.mark.parametrize(
    ("family", "settings", "rank", "targets"),
    [
        ("base", {}, 8, {"linear_qkv"}),
        ("base", {"target_modules": ["k_proj"]}, 4, {"linear_qkv"}),
        ("base", {"target_modules": ["o_proj", "down_proj"]}, 4, {"linear_proj", "linear_fc2"}),
        ("base", {"target_modules": EVERY_LLAMA_LINEAR, "use_rslora": True}, 12, set(LINEAR_MODULES)),
        ("base", {"target_modules": ["up_proj", "gate_proj"], "layers_to_transform": [1, 2]}, 8, {fc1(1), fc1(2)}),
        ("base", {"target_modules": UP_AND_DOWN, "exclude_modules": ["3.mlp.up_proj"]}, 4, {fc1(0), fc2(0), fc2(3)}),
        ("bloom", {"target_modules": ["query_key_value", "dense"]}, 4, {"linear_qkv", "linear_proj"}),
    ],
)
def test_imported_adapter_computes_what_it_does_in_peft(family, settings, rank, targets, moved, tmp_path):
    adapter = make_adapter(moved.base(family), tmp_path / "adapter", **settings)
    record = imported(adapter, moved.base(family))
    assert record.config.peft.lora_rank == rank
    assert set(record.config.peft.target_modules) == targets
    assert record.config.peft.lora_scale == pytest.approx(6 / 2 if settings.get("use_rslora") else 6 / 4, rel=1e-12)
    assert verify(tmp_path / "run", adapter).logits.absolute < 1e-4
    assert verify(tmp_path / "run", moved.base(family)).logits.absolute > 0.1


def test_a_run_has_its_own_files_and_is_told_the_flags_to_load_it(moved, adapter, tmp_path, capsys):
    record = imported(adapter, moved.base("base"))
    printed = capsys.readouterr().out
    assert "so the rank is 8 instead of 4; alpha 12 keeps the scale of 1.5." in printed
    assert printed.endswith(f"{LOAD_IT} --lora-rank 8 --lora-alpha 12 --peft-target-modules linear_qkv\n")
    assert record.config.peft.lora_alpha == 12
    assert (tmp_path / "run" / "latest_checkpointed_iteration.txt").read_text() == "0\n"
    config = config_of(tmp_path / "run")
    assert config["method"] == "lora" and config["base_model_name_or_path"] == str(moved.base("base"))
    assert config["lora_rank"] == 8 and config["adapted_layers"] == list(record.adapted_layers)
    assert record.position == {"iteration": 0, "consumed_samples": 0, "consumed_tokens": 0}
    assert set(record.base_fingerprint or ()) == {"config.json", "model.safetensors"}
    assert len(record.adapted_layers) == 4


@pytest.mark.parametrize(
    ("settings", "flag"), [({"use_rslora": True}, "--lora-rs"), ({"lora_dropout": 0.25}, "--lora-dropout 0.25")]
)
def test_settings_are_among_the_flags_to_load_it_with_and_a_rank_that_stays_is_not_mentioned(
    settings, flag, moved, tmp_path, capsys
):
    base = moved.base("base")
    imported(make_adapter(base, tmp_path / "adapter", target_modules=["o_proj"], **settings), base)
    flags = f"--lora-rank 4 --lora-alpha 6 {flag} --peft-target-modules linear_proj"
    assert capsys.readouterr().out == f"{LOAD_IT} {flags}\n"


def test_what_pads_the_rank_is_zero(moved, tmp_path):
    """o_proj needs rank 4 of the 8 that q_proj and v_proj take together: training leaves the others at zero."""
    adapter = make_adapter(moved.base("base"), tmp_path / "adapter", target_modules=["q_proj", "v_proj", "o_proj"])
    imported(adapter, moved.base("base"))
    tensors = open_adapters(tmp_path / "run").of("decoder.layers.2.self_attention.linear_proj")
    A, B = tensors["A"], tensors["B"]
    assert A.shape == (8, 120) and B.shape == (96, 8)
    assert A[:4].all() and B[:, :4].all()
    assert not A[4:].any() and not B[:, 4:].any()


def test_export_and_import_give_the_run_back(moved):
    assert moved.came_back


def test_pickled_weights_are_read(moved, adapter, tmp_path):
    weights, pickled = adapter / "adapter_model.safetensors", adapter / "adapter_model.bin"
    torch.save(load_file(weights), pickled)
    weights.unlink()
    imported(adapter, moved.base("base"))
    assert verify(tmp_path / "run", adapter).logits.absolute < 1e-4


GATE = {"target_modules": ["gate_proj"]}
Q3 = "base_model.model.model.layers.3.self_attn.q_proj.lora_{}.weight"


@pytest.mark.parametrize(
    ("name", "dtype", "message"),
    [
        (Q3.format("B"), None, rf"1 missing: {Q3.format('B')}\."),
        ("base_model.model.lm_head.lora_A.weight", torch.float32, "1 that belong to no targeted layer .*lm_head"),
        (Q3.format("A").replace("q_", "o_"), torch.float32, "1 that belong to no targeted layer .*o_proj.lora_A"),
        (Q3.format("A"), torch.int8, "1 of an unsupported number type: .*q_proj.lora_A.weight I8"),
    ],
)
def test_tensors_that_do_not_fit_are_named(name, dtype, message, moved, adapter, tmp_path):
    weights = load_file(adapter / "adapter_model.safetensors")
    weights.pop(name, None)
    if dtype:
        weights[name] = torch.zeros(4, 96, dtype=dtype)
    save_file(weights, adapter / "adapter_model.safetensors")
    with pytest.raises(ConfigurationError, match=message):
        import_adapter(adapter, tmp_path / "run", pretrained_checkpoint=moved.base("base"))
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize(
    ("settings", "base", "message"),
    [
        (GATE, "small", r"do not fit --pretrained-.*small\. 4 of the wrong shape: .*lora_A.*\[4, 96\] instead"),
        (GATE, "bloom", r"target_modules \['gate_proj'\] of .* name no linear layer of --pretrained-.*bloom:"),
        ({"r": 50}, "base", r"takes --lora-rank 100 instead of 50; but .*linear_qkv has only 96"),
    ],
)
def test_another_base_and_a_rank_that_a_layer_cannot_hold_are_refused(settings, base, message, moved, tmp_path):
    adapter = make_adapter(moved.base("base"), tmp_path / "adapter", **settings)
    with pytest.raises(ConfigurationError, match=message):
        import_adapter(adapter, tmp_path / "run", pretrained_checkpoint=moved.base(base))


def test_missing_base_and_files_are_named(moved, adapter, tmp_path):
    base, bare = moved.base("base"), tmp_path / "bare"
    bare.mkdir()
    shutil.copy(base / "config.json", bare)
    for given, told in (
        (None, "import-adapter needs --pretrained-checkpoint, the folder"),
        (bare, "--pretrained-checkpoint .*bare holds no weights"),
        (base, "holds neither adapter_model.safetensors nor adapter_model.bin"),
    ):
        if given == base:
            (adapter / "adapter_model.safetensors").unlink()
        with pytest.raises(ConfigurationError, match=told):
            import_adapter(adapter, tmp_path / "run", pretrained_checkpoint=given)
