"""A merged folder is in transformers what the adapted model is here; folded rotations are those of training."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_peft.checkpoint.folders import write_manifest
from megatron_peft.checkpoint.run_record import read_run_record
from megatron_peft.config import ConfigurationError
from megatron_peft.conversion.convert import hf_to_megatron, merge
from megatron_peft.conversion.verify import verify
from megatron_peft.models.families import read_shape
from tests.conversion.adapter_runs import RUNS, trained_on
from tests.conversion.megatron_folders import equal, flip_a_byte, global_tensors, save_run, tensors_of


@pytest.mark.parametrize("run", RUNS)
def test_merged_folder_computes_what_the_adapted_model_does(run, moved, tmp_path):
    merged = merge(moved.run(run), tmp_path / "merged", progress=False)
    assert verify(merged, moved.run(run)).logits.absolute < 1e-4
    assert verify(merged, read_run_record(moved.run(run)).config.model.pretrained_checkpoint).logits.absolute > 0.1


def test_what_has_no_adapter_keeps_its_bits(moved, tmp_path):
    merged, base = tensors_of(merge(moved.run("pp2"), tmp_path / "merged")), tensors_of(moved.base("base"))
    assert merged.keys() == base.keys()
    changed = {name.partition("layers.")[2] for name in base if not torch.equal(base[name], merged[name])}
    names = {f"{layer}.mlp.{part}" for layer in (1, 2) for part in ("gate", "up")}
    names |= {f"{layer}.mlp.down" for layer in range(4)} | {f"3.self_attn.{part}" for part in "qkv"}
    assert changed == {f"{name}_proj.weight" for name in names}


def test_type_and_shards_are_chosen(moved, tmp_path):
    """Sums are formed in float32 and rounded once."""
    merge(moved.run("tp2"), tmp_path / "whole")
    merge(moved.run("tp2"), tmp_path / "small", dtype=torch.bfloat16, max_shard_bytes=200_000)
    index = json.loads((tmp_path / "small" / "model.safetensors.index.json").read_text())["weight_map"]
    small = {name: load_file(tmp_path / "small" / file)[name] for name, file in index.items()}
    assert len(set(index.values())) > 2
    assert equal(small, {name: tensor.bfloat16() for name, tensor in tensors_of(tmp_path / "whole").items()})
    assert json.loads((tmp_path / "small" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("form", ["converted", "run"])
def test_base_in_the_form_of_megatron(form, moved, tmp_path):
    """Converted, or a run of full fine-tuning: config and tokenizer come along; another such base is refused."""
    bases = {name: tmp_path / name for name in ("base", "other")}
    for name, base in bases.items():
        original = Path(shutil.copytree(moved.base(name), tmp_path / f"hf-{name}"))
        (original / "tokenizer.json").write_text("{}")
        if form == "converted":
            hf_to_megatron(original, base, progress=False)
        else:
            save_run(original, base, global_tensors(original, padded_vocab_size=1024), shape=read_shape(original))
            write_manifest(base / "iter_0000002", {})
    run = trained_on(moved.run("tp2"), tmp_path / "run", bases["base"])
    merge(run, tmp_path / "merged")
    merge(moved.run("tp2"), tmp_path / "expected")
    assert equal(tensors_of(tmp_path / "merged"), tensors_of(tmp_path / "expected"))
    assert (tmp_path / "merged" / "tokenizer.json").is_file()
    with pytest.raises(ConfigurationError, match=r"other is another one \(.*__0_0.distcp"):
        merge(run, tmp_path / "wrong", pretrained_checkpoint=bases["other"])
    if form == "run":
        flip_a_byte(bases["base"] / "iter_0000002" / "__0_0.distcp")
        with pytest.raises(ConfigurationError, match="__0_0.distcp"):
            merge(run, tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("other", r"trained on the base model .*base, but .*other is another one \(model.safetensors\): give the base"),
        ("small", r"small is another one \(hidden_size 96 there, 72 here"),
        ("nowhere", r"the base model .*nowhere of the run in .* is not there: give its folder with --pretrained-check"),
    ],
)
def test_another_base_is_refused(base, message, moved, tmp_path):
    with pytest.raises(ConfigurationError, match=message):
        merge(moved.run("tp2"), tmp_path / "merged", pretrained_checkpoint=moved.base(base))
    assert not list(tmp_path.iterdir())
