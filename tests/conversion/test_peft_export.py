"""HF PEFT opens an exported LoRA or BOFT and computes what the run does; what it cannot express is refused."""

import shutil
from dataclasses import replace
from typing import Any

import huggingface_hub
import peft
import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from peft.tuners.boft import layer as peft_boft_layer
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from megatron_peft.adapters import boft
from megatron_peft.adapters.linear import AdaptedColumnParallelLinear
from megatron_peft.checkpoint.run_record import read_run_record
from megatron_peft.config import ConfigurationError, ModelConfig, PeftConfig
from megatron_peft.conversion.convert import hf_to_megatron
from megatron_peft.conversion.peft_export import export_adapter, export_as_lora, is_exportable
from megatron_peft.conversion.peft_import import import_adapter
from megatron_peft.conversion.trained_adapters import open_adapters
from megatron_peft.conversion.verify import verify
from tests.conversion.adapter_runs import EVERY_LLAMA_LINEAR, config_of, copy_run, trained_on, with_config
from tests.one_rank import one_rank

SOME = {f"model.layers.{layer}.mlp.{part}_proj" for layer in (1, 2) for part in ("gate", "up")}
TARGETS = {
    "tp2": set(EVERY_LLAMA_LINEAR),
    "pp2": {"down_proj", *SOME, *(f"model.layers.3.self_attn.{part}_proj" for part in "qkv")},
    "bloom": {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"},
    "paper": set(EVERY_LLAMA_LINEAR),
    "boft": set(EVERY_LLAMA_LINEAR),
    "butterfly": {"q_proj", "k_proj", "v_proj", "model.layers.0.mlp.down_proj"},
    "projection": set(EVERY_LLAMA_LINEAR),
}


@pytest.mark.parametrize("run", TARGETS)
def test_peft_computes_what_the_adapted_model_does(run, moved, apart, tmp_path, pure_torch):
    base = read_run_record(moved.run(run)).config.model.pretrained_checkpoint
    adapter = export_adapter(moved.run(run), tmp_path / "adapter")
    assert set(config_of(adapter)["target_modules"]) == TARGETS[run]
    assert config_of(adapter)["base_model_name_or_path"] == base
    assert apart(adapter, moved.run(run)).absolute < 1e-4
    assert apart(adapter, moved.base_of(run)).absolute > 0.1
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter))
    loaded, exported = peft.get_peft_model_state_dict(model), load_file(adapter / "adapter_model.safetensors")
    assert loaded.keys() == exported.keys()
    assert all(torch.equal(loaded[name], exported[name]) for name in exported)


def test_export_and_import_give_the_run_back(moved):
    assert moved.came_back


@pytest.mark.parametrize("run", ["boft", "butterfly"])
def test_export_and_import_give_the_rotations_back(run, moved, tmp_path, capsys):
    export_adapter(moved.run(run), tmp_path / "adapter")
    import_adapter(tmp_path / "adapter", tmp_path / "run", pretrained_checkpoint=moved.base_of(run))
    before, after = open_adapters(moved.run(run)), open_adapters(tmp_path / "run")
    layers, settings = before.record.adapted_layers, before.record.config.peft
    assert after.record.adapted_layers == layers
    assert all(torch.equal(after.of(layer)["Q"], before.of(layer)["Q"]) for layer in layers)
    flags = f"--boft-block-size {settings.boft_block_size} --boft-factors {settings.boft_factors} --rotation-side input"
    told = f"Load it with --finetune --peft-method boft {flags} --peft-target-modules "
    assert told in capsys.readouterr().out


@pytest.mark.parametrize("stabilised", [True, False])
def test_a_start_that_is_subtracted_doubles_the_rank_and_keeps_the_scale(stabilised, moved, tmp_path):
    """The run has rank 4 and alpha 3."""
    settings = replace(read_run_record(moved.run("paper")).config.peft, lora_rs=stabilised)
    export_adapter(copy_run(moved.run("paper"), tmp_path / "run", with_config(peft=settings)), tmp_path / "adapter")
    config = config_of(tmp_path / "adapter")
    assert config["r"] == 8 and config["use_rslora"] is stabilised
    assert config["lora_alpha"] == pytest.approx(3 * 2**0.5 if stabilised else 6, rel=1e-12)


@pytest.mark.parametrize(
    ("run", "changes", "told"),
    [
        ("urnn", {}, r"has no equivalent of --peft-method urnn.*merge"),
        ("hybrid", {}, r"has no equivalent of --peft-method hybrid.*merge"),
        ("boft", {"rotation_side": "output"}, r"rotated the output side .* rotates the input: .*merge"),
        ("tp2", {"method": "full"}, r"run of full fine-tuning and holds no adapters: .* megatron-to-hf"),
    ],
)
def test_what_peft_does_not_have_is_refused(run, changes, told, moved, tmp_path):
    settings = (
        PeftConfig(**changes) if run == "tp2" else replace(read_run_record(moved.run(run)).config.peft, **changes)
    )
    copy = copy_run(moved.run(run), tmp_path / "run", with_config(peft=settings))
    with pytest.raises(ConfigurationError, match=told):
        export_adapter(copy, tmp_path / "adapter")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_blocks_with_an_eigenvalue_of_minus_one_are_refused(moved, tmp_path, monkeypatch):
    around = torch.diag(torch.tensor([-1.0, -1.0, 1.0, 1.0], dtype=torch.float64))
    assert not (boft.inverse_cayley(around).abs() < boft.LARGEST_NUMBER).all()
    monkeypatch.setattr(boft, "LARGEST_NUMBER", 1e-3)
    with pytest.raises(ConfigurationError, match=r"a block of decoder.layers.0.* has an eigenvalue of -1, .* merge"):
        export_adapter(moved.run("projection"), tmp_path / "adapter")
    assert not list(tmp_path.iterdir())


def test_several_factors_need_the_extension(moved, tmp_path, no_extension, capsys):
    export_adapter(moved.run("boft"), tmp_path / "one", license="mit")
    assert capsys.readouterr().out == ""
    export_adapter(moved.run("butterfly"), tmp_path / "three")
    assert "HF PEFT opens this adapter only with its CUDA extension" in capsys.readouterr().out
    with pytest.raises(ConfigurationError, match=r"HF PEFT cannot open .*three .*boft_R.* needs its CUDA extension"):
        verify(tmp_path / "three", moved.run("butterfly"))


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
    export_as_lora(run, tmp_path / "approximate", num_tokens=0, progress=False)
    for folder in ("plain", "approximate"):
        assert config_of(tmp_path / folder)["base_model_name_or_path"] == "org/base"
    assert verify(tmp_path / "plain", run).logits.absolute < 1e-4  # which finds it there


def test_base_in_megatrons_form_is_not_named_and_that_is_said(moved, tmp_path, capsys):
    base = hf_to_megatron(moved.base("base"), tmp_path / "base", progress=False)
    export_adapter(trained_on(moved.run("tp2"), tmp_path / "run", base), tmp_path / "out")
    assert config_of(tmp_path / "out")["base_model_name_or_path"] is None
    assert f"The base model {base} is in Megatron's form, which HF PEFT does not open" in capsys.readouterr().out
    card = (tmp_path / "out" / "README.md").read_text()
    assert "vllm serve HUGGING_FACE_BASE --enable-lora" in card and "base_model:" not in card


def test_a_layer_with_boft_has_the_output_and_the_gradients_of_pefts(pure_torch):
    draw = torch.Generator().manual_seed(2)
    in_features, out_features = 64, 24
    config = peft.BOFTConfig(boft_block_size=8, boft_n_butterfly_factor=3)
    theirs = peft_boft_layer.Linear(nn.Linear(in_features, out_features), "default", config)
    D = theirs.boft_R["default"]
    kinds = {"num_layers": 1, "hidden_size": in_features, "num_attention_heads": 1, "perform_initialization": False}
    sizes: Any = TransformerConfig(**kinds)
    sizes.linear_biases = {"linear_fc1"}
    settings = PeftConfig("boft", rotation_side="input", boft_block_size=8, boft_factors=3)
    with one_rank():
        of_layer: Any = {"config": sizes, "init_method": None, "tp_comm_buffer_name": "fc1"}
        ours = AdaptedColumnParallelLinear(in_features, out_features, **of_layer).requires_grad_(False)
        ours.adapter = boft.Boft(ours.layout, settings, "layer.adapter", 0, torch.float32)
        with torch.no_grad():
            D.normal_(std=0.3, generator=draw)
            ours.adapter.Q.copy_(boft.from_huggingface(D))
            ours.weight.copy_(theirs.base_layer.weight.normal_(std=in_features**-0.5, generator=draw))
            ours.bias.copy_(theirs.base_layer.bias)
        x, weights = (torch.randn(5, 2, size, generator=draw) for size in (in_features, out_features))
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        outputs = [ours(inputs[0])[0], theirs(inputs[1])]
        for output in outputs:
            (output * weights).sum().backward()
    assert (outputs[0] - outputs[1]).abs().max() < 1e-5
    assert (inputs[0].grad - inputs[1].grad).abs().max() < 1e-5
    # A number above the diagonal stands for two of theirs; they differentiate (D - D^T) / 2 in each.
    torch.testing.assert_close(ours.adapter.Q.grad, 2 * boft.from_huggingface(D.grad), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        pytest.param({"method": "lora"}, True, id="LoRA"),
        pytest.param({"method": "boft", "rotation_side": "input"}, True, id="BOFT of the input side"),
        pytest.param({"method": "boft", "rotation_side": "output"}, False, id="BOFT of the output side"),
        pytest.param({"method": "urnn"}, False, id="no form in HF PEFT"),
    ],
)
def test_is_exportable_knows_the_forms_of_hf_peft(settings, expected):
    """`certify` needs the package peft for these only."""
    assert is_exportable(PeftConfig(**settings)) is expected
