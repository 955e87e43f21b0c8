"""HF PEFT opens an exported LoRA, and computes with it what the adapted model does here."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megatron_peft.checkpoint.folders import RECORD
from megatron_peft.checkpoint.manifest import write_manifest
from megatron_peft.checkpoint.record import RunRecord, find_checkpoint, read_record, read_run_record
from megatron_peft.config import ConfigurationError, ModelConfig, PeftConfig
from megatron_peft.conversion.adapter_checkpoint import known_fingerprint
from megatron_peft.conversion.peft_export import export_adapter
from megatron_peft.conversion.to_megatron import hf_to_megatron
from megatron_peft.conversion.verify import verify
from tests.conversion.adapter_runs import Moved, copy_run

TARGETS = {
    "tp2": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    "pp2": {
        "down_proj",
        *(f"model.layers.{layer}.mlp.{part}_proj" for layer in (1, 2) for part in ("gate", "up")),
        *(f"model.layers.3.self_attn.{part}_proj" for part in "qkv"),
    },
    "bloom": {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"},
}
TARGETS["paper"] = TARGETS["tp2"]


@pytest.mark.parametrize("run", TARGETS)
def test_peft_computes_what_the_adapted_model_does(run: str, moved: Moved, tmp_path: Path) -> None:
    base = read_run_record(moved.run(run)).config.model.pretrained_checkpoint
    export_adapter(moved.run(run), tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert set(config["target_modules"]) == TARGETS[run]
    assert config["base_model_name_or_path"] == base
    assert verify(tmp_path / "adapter", moved.run(run)).logits.absolute < 1e-4
    assert verify(tmp_path / "adapter", base).logits.absolute > 0.1


@pytest.mark.parametrize("run", TARGETS)
def test_peft_finds_every_tensor_that_it_looks_for(run: str, moved: Moved, tmp_path: Path) -> None:
    export_adapter(moved.run(run), tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(read_run_record(moved.run(run)).config.model.pretrained_checkpoint)
    model = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    loaded = peft.get_peft_model_state_dict(model)
    exported = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert loaded.keys() == exported.keys()
    assert all(torch.equal(loaded[name], exported[name]) for name in exported)


def test_a_start_that_is_subtracted_doubles_the_rank(moved: Moved, tmp_path: Path) -> None:
    """The run has rank 4, alpha 3, and a scale of alpha / sqrt(rank)."""
    export_adapter(moved.run("paper"), tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == 8 and config["use_rslora"]
    assert config["lora_alpha"] / 8**0.5 == pytest.approx(3 / 4**0.5, rel=1e-12)


@pytest.mark.parametrize("run", ["urnn", "hybrid"])
def test_methods_that_peft_does_not_have_are_refused(run: str, moved: Moved, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=rf"nothing that computes what --peft-method {run} does.*py merge"):
        export_adapter(moved.run(run), tmp_path / "adapter")
    assert not list(tmp_path.iterdir())


def configured(record: RunRecord, **groups: Any) -> RunRecord:
    """With other groups of the configuration."""
    return replace(record, config=replace(record.config, **groups))


def test_base_may_be_elsewhere(moved: Moved, tmp_path: Path) -> None:
    """Its weights are not needed; a base that is given is compared with the one that was trained on."""
    model = ModelConfig(pretrained_checkpoint="far/away")
    run = copy_run(moved.run("tp2"), tmp_path / "run", lambda record: configured(record, model=model))
    export_adapter(run, tmp_path / "without")
    assert (
        json.loads((tmp_path / "without" / "adapter_config.json").read_text())["base_model_name_or_path"] == "far/away"
    )
    with pytest.raises(ConfigurationError, match=r"trained on the base model far/away, but .*other is another one"):
        export_adapter(run, tmp_path / "with", pretrained_checkpoint=moved.base("other"))


def test_base_in_megatrons_form_is_not_named_and_that_is_said(moved: Moved, tmp_path: Path, capsys) -> None:
    base = hf_to_megatron(moved.base("base"), tmp_path / "base", progress=False)
    model = ModelConfig(pretrained_checkpoint=str(base))
    run = copy_run(moved.run("tp2"), tmp_path / "run", lambda record: configured(record, model=model))
    checkpoint = find_checkpoint(run)
    record = replace(read_record(checkpoint), base_fingerprint=known_fingerprint(base))
    (checkpoint / RECORD).write_text(record.to_json())
    write_manifest(checkpoint, {})
    export_adapter(run, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] is None
    assert f"The base model {base} is in Megatron's form, which HF PEFT does not open" in capsys.readouterr().out


def test_full_fine_tuning_has_no_adapter(moved: Moved, tmp_path: Path) -> None:
    peft = PeftConfig(method="full")
    run = copy_run(moved.run("tp2"), tmp_path / "run", lambda record: configured(record, peft=peft))
    with pytest.raises(ConfigurationError, match=r"run of full fine-tuning and holds no adapters: .* megatron-to-hf"):
        export_adapter(run, tmp_path / "adapter")


def test_folder_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=f"{tmp_path} holds no checkpoint: give the --save folder of a run"):
        export_adapter(tmp_path, tmp_path / "adapter")


def test_output_that_exists_is_refused(moved: Moved, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=f"--output {tmp_path} exists already"):
        export_adapter(moved.run("tp2"), tmp_path)
