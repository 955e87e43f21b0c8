"""Adapters that were trained on a quantized base are merged into its weights, or into what those were rounded to."""

import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_peft.adapters.quantized_weight import trained_values
from megatron_peft.checkpoint.run_record import find_checkpoint, read_record
from megatron_peft.checkpoint.save import draft_checkpoint
from megatron_peft.commands.convert import main
from megatron_peft.config import ConfigurationError
from megatron_peft.conversion import model_card
from megatron_peft.conversion.convert import merge
from megatron_peft.conversion.model_card import CARD
from megatron_peft.conversion.peft_export import export_adapter, export_as_lora
from megatron_peft.conversion.verify import verify
from tests.checkpoint.runs import Files, configure, start
from tests.conversion.adapter_runs import copy_run, with_config
from tests.one_rank import one_rank
from tests.tiny_llama import save_llama, save_pairs

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "head_dim": 32, "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Two steps on NF4, the output layer too, of some layers, with changes that show."""
    place = tmp_path_factory.mktemp("quantized")
    save_llama(place / "bases" / "base", **SIZES)
    files = Files(str(place / "bases"), str(save_pairs(place / "pairs.jsonl")), str(place))
    peft: dict[str, Any] = {"target_modules": ("linear_qkv", "linear_fc2")}
    quantized = {"base_precision": "nf4", "quantize_output_layer": True}
    settings = {"model": quantized, "peft": peft, "checkpoint": {"save": str(place / "run")}}
    with one_rank():
        trained = start(configure(files, settings | {"optimizer": {"lr": 0.02}}))
        trained.train(2)
        draft_checkpoint(trained.state).complete()
    return place / "run"


def test_merged_into_the_trained_values_it_computes_what_the_run_did(run, tmp_path, capsys):
    merge(run, tmp_path / "values", into="trained-values", progress=False)
    merge(run, tmp_path / "original", progress=False)
    found = verify(run, tmp_path / "values")
    assert found.logits.relative < 1e-5
    assert found.on_original is not None and found.on_original.relative > 1e-3
    found = verify(run, tmp_path / "original")
    assert found.on_original is not None and found.on_original.relative < 1e-5 and found.logits.relative > 1e-3
    assert "nf4; merged into the values that it was trained on" in (tmp_path / "values" / CARD).read_text()
    assert "nf4; merged into its original weights" in (tmp_path / "original" / CARD).read_text()
    for merged in ("original", "values"):
        assert main(["verify", "--input", str(run), "--reference", str(tmp_path / merged)]) == 0
    assert (
        main(
            [
                "verify",
                "--input",
                str(run),
                "--reference",
                read_record(find_checkpoint(run)).config.model.pretrained_checkpoint or "",
            ]
        )
        == 1
    )
    assert (
        "logits with the original weights of the base, not those that were trained on: lar" in capsys.readouterr().out
    )


@pytest.mark.parametrize("precision", ["nf4", "fp8"])
def test_of_a_run_in_bf16_they_are_the_values_that_bf16_rounds_to(run, tmp_path, precision):
    model = read_record(find_checkpoint(run)).config.model
    in_bf16 = copy_run(run, tmp_path / "bf16", with_config(model=replace(model, bf16=True, base_precision=precision)))
    merge(in_bf16, tmp_path / "values", into="trained-values", num_tokens=0, progress=False)
    assert verify(in_bf16, tmp_path / "values").logits.relative < 1e-5


def test_layers_without_an_adapter_are_rounded_too_and_nothing_else_is(run, tmp_path):
    model = read_record(find_checkpoint(run)).config.model
    of_layers = copy_run(run, tmp_path / "layers", with_config(model=replace(model, quantize_output_layer=False)))
    merge(run, tmp_path / "values", into="trained-values", progress=False)
    merge(of_layers, tmp_path / "of layers", into="trained-values", progress=False)
    folders = run.parent / "bases" / "base", tmp_path / "values", tmp_path / "of layers"
    base, found, without_output = (load_file(folder / "model.safetensors") for folder in folders)
    for name in ("model.layers.0.self_attn.o_proj.weight", "lm_head.weight"):
        assert torch.equal(found[name], trained_values(base[name], "nf4", torch.float32))
    assert torch.equal(found["model.embed_tokens.weight"], base["model.embed_tokens.weight"])
    assert torch.equal(without_output["lm_head.weight"], base["lm_head.weight"])


def differences(folder: Path) -> list[float]:
    """The relative differences on a card: with the weights that were trained on, and with the original ones."""
    rows = re.findall(
        r"^\| adapters on .* \| largest difference .*, relative (.*) \|$", (folder / CARD).read_text(), re.M
    )
    return [*map(float, rows)]


@pytest.mark.parametrize("into", ["original", "trained-values"])
def test_the_card_of_a_merged_model_has_what_verify_finds(run, tmp_path, into, capsys):
    argv = ["merge", "--input", str(run), "--output", str(tmp_path / "merged"), "--into", into, "--num-tokens", "9"]
    assert main(argv) == 0
    found = verify(run, tmp_path / "merged", num_tokens=9)
    assert found.on_original is not None
    expected = [found.logits.relative, found.on_original.relative]
    assert differences(tmp_path / "merged") == pytest.approx(expected, rel=5e-3)
    merge(run, tmp_path / "none", into=into, num_tokens=0, progress=False)
    assert differences(tmp_path / "none") == [] and "Logits" not in (tmp_path / "none" / CARD).read_text()


def test_a_model_that_has_no_room_is_compared_only_if_that_is_asked_for(run, tmp_path, capsys, monkeypatch):
    (tmp_path / "meminfo").write_text("MemTotal: 9999999 kB\nMemAvailable:     100 kB\n")
    monkeypatch.setattr(model_card, "MEMORY", tmp_path / "meminfo")
    merge(run, tmp_path / "no room", progress=False)
    told = "the model in float32 has 0.0 GB, more than half of the 0.0 GB that this machine has left"
    output = capsys.readouterr().out
    assert told in output and "--num-tokens 64 does it nevertheless" in output
    assert differences(tmp_path / "no room") == []
    merge(run, tmp_path / "asked", num_tokens=8, progress=False)
    assert len(differences(tmp_path / "asked")) == 2


def test_the_card_is_made_with_a_base_that_has_moved(run, tmp_path):
    shutil.copytree(run.parent / "bases" / "base", tmp_path / "moved")
    elsewhere = with_config(
        model=replace(read_record(find_checkpoint(run)).config.model, pretrained_checkpoint=str(tmp_path / "gone"))
    )
    moved = copy_run(run, tmp_path / "run", elsewhere)
    merge(moved, tmp_path / "merged", pretrained_checkpoint=tmp_path / "moved", progress=False)
    assert len(differences(tmp_path / "merged")) == 2


def test_the_card_of_an_adapter_has_what_verify_finds_or_it_is_said_why_not(run, tmp_path, capsys, monkeypatch):
    """HF PEFT puts it on the original weights."""
    of_values, of_original = differences(export_adapter(run, tmp_path / "adapter"))
    assert of_original < 1e-5 and of_values > 1e-3
    of_values, of_original = differences(export_as_lora(run, tmp_path / "lora", progress=False))
    assert of_original < 1e-5 and of_values > 1e-3
    monkeypatch.setitem(sys.modules, "peft", None)
    assert differences(export_adapter(run, tmp_path / "without")) == []
    assert "The model card says nothing of logits: " in capsys.readouterr().out


def test_a_run_on_a_base_as_it_is_has_no_other_values(run, tmp_path):
    model = read_record(find_checkpoint(run)).config.model
    as_it_is = replace(model, base_precision="run", quantize_output_layer=False)
    plain = copy_run(run, tmp_path / "plain", with_config(model=as_it_is))
    with pytest.raises(ConfigurationError, match="--into trained-values: .* was trained on its base's own weights"):
        merge(plain, tmp_path / "values", into="trained-values", progress=False)
    merge(plain, tmp_path / "original", progress=False)
    assert differences(tmp_path / "original") == []
    merge(plain, tmp_path / "compared", num_tokens=1000, progress=False)  # its sequences have 256
    assert len(differences(tmp_path / "compared")) == 1
    assert verify(plain, tmp_path / "original").on_original is None
    assert "base while it was trained" not in (tmp_path / "original" / CARD).read_text()
