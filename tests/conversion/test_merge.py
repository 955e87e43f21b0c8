"""A merged folder is in transformers what the adapted model is here."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_peft.checkpoint.folders import RECORD, TRACKER
from megatron_peft.checkpoint.manifest import write_manifest
from megatron_peft.checkpoint.record import RunRecord, read_run_record
from megatron_peft.config import ConfigurationError, ModelConfig, PeftConfig
from megatron_peft.conversion.adapter_checkpoint import known_fingerprint
from megatron_peft.conversion.merge import MERGERS, merge
from megatron_peft.conversion.to_megatron import hf_to_megatron
from megatron_peft.conversion.verify import verify
from megatron_peft.models.huggingface import read_shape
from tests.checkpoint.records import make_record
from tests.conversion.adapter_runs import RUNS, Moved, copy_run


@pytest.mark.parametrize("run", RUNS)
def test_merged_folder_computes_what_the_adapted_model_does(run: str, moved: Moved, tmp_path: Path) -> None:
    merge(moved.run(run), tmp_path / "merged", progress=False)
    assert verify(tmp_path / "merged", moved.run(run)).logits.absolute < 1e-4
    base = read_run_record(moved.run(run)).config.model.pretrained_checkpoint
    assert verify(tmp_path / "merged", base).logits.absolute > 0.1


def test_what_has_no_adapter_keeps_its_bits(moved: Moved, tmp_path: Path) -> None:
    merge(moved.run("pp2"), tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    base = load_file(moved.base("base") / "model.safetensors")
    assert merged.keys() == base.keys()
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    assert changed == {
        *(f"model.layers.{layer}.mlp.{part}_proj.weight" for layer in (1, 2) for part in ("gate", "up")),
        *(f"model.layers.{layer}.mlp.down_proj.weight" for layer in range(4)),
        *(f"model.layers.3.self_attn.{part}_proj.weight" for part in "qkv"),
    }


def test_type_and_shards_are_chosen(moved: Moved, tmp_path: Path) -> None:
    """Sums are formed in float32 and rounded once."""
    merge(moved.run("tp2"), tmp_path / "whole")
    merge(moved.run("tp2"), tmp_path / "small", dtype=torch.bfloat16, max_shard_bytes=200_000)
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    index = json.loads((tmp_path / "small" / "model.safetensors.index.json").read_text())["weight_map"]
    small = {name: load_file(tmp_path / "small" / file)[name] for name, file in index.items()}
    assert len(set(index.values())) > 2
    assert all(torch.equal(small[name], whole[name].bfloat16()) for name in whole)
    assert json.loads((tmp_path / "small" / "config.json").read_text())["dtype"] == "bfloat16"


def trained_on(run: Path, to: Path, base: Path) -> Path:
    """A copy of a run whose record names another base, by its fingerprint too."""
    model = ModelConfig(pretrained_checkpoint=str(base))

    def change(record: RunRecord) -> RunRecord:
        return replace(record, config=replace(record.config, model=model), base_fingerprint=known_fingerprint(base))

    return copy_run(run, to, change)


def full_run(folder: Path, base: Path) -> Path:
    """What a run of full fine-tuning that changed nothing leaves."""
    checkpoint = folder / "iter_0000002"
    shutil.copytree(hf_to_megatron(base, folder / "converted", progress=False), checkpoint)
    for name in ("config.json", "tokenizer.json"):
        (checkpoint / name).unlink(missing_ok=True)
    record = replace(make_record(shape=read_shape(base)), base_fingerprint=None)
    config = replace(record.config, model=ModelConfig(str(base)), peft=PeftConfig(method="full"))
    (checkpoint / RECORD).write_text(replace(record, config=config).to_json())
    write_manifest(checkpoint, {})
    (folder / TRACKER).write_text("2\n")
    shutil.rmtree(folder / "converted")
    return folder


@pytest.mark.parametrize("form", ["converted", "run"])
def test_base_in_the_form_of_megatron(form: str, moved: Moved, tmp_path: Path) -> None:
    """Converted, or a run of full fine-tuning: config and tokenizer come along, and another such base is refused."""
    bases = {}
    for name in ("base", "other"):
        original = Path(shutil.copytree(moved.base(name), tmp_path / f"hf-{name}"))
        (original / "tokenizer.json").write_text("{}")
        converted = form == "converted"
        folder = tmp_path / name
        bases[name] = hf_to_megatron(original, folder, progress=False) if converted else full_run(folder, original)
    run = trained_on(moved.run("tp2"), tmp_path / "run", bases["base"])
    merge(run, tmp_path / "merged")
    merge(moved.run("tp2"), tmp_path / "expected")
    merged, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "expected"))
    assert merged.keys() == expected.keys()
    assert all(torch.equal(merged[name], expected[name]) for name in expected)
    assert (tmp_path / "merged" / "tokenizer.json").is_file()
    with pytest.raises(ConfigurationError, match=r"other is another one \(.*__0_0.distcp"):
        merge(run, tmp_path / "wrong", pretrained_checkpoint=bases["other"])


def test_a_damaged_run_that_is_the_base_is_named(moved: Moved, tmp_path: Path) -> None:
    base = full_run(tmp_path / "full", moved.base("base"))
    run = trained_on(moved.run("tp2"), tmp_path / "run", base)
    path = base / "iter_0000002" / "__0_0.distcp"
    numbers = bytearray(path.read_bytes())
    numbers[1000] ^= 1
    path.write_bytes(numbers)
    with pytest.raises(ConfigurationError, match="__0_0.distcp"):
        merge(run, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("other", r"trained on the base model .*base, but .*other is another one \(model.safetensors\): give the base"),
        ("small", r"small is another one \(hidden_size 96 there, 72 here"),
        ("nowhere", r"the base model .*nowhere of the run in .* is not there: give its folder with --pretrained-check"),
    ],
)
def test_another_base_is_refused(base: str, message: str, moved: Moved, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=message):
        merge(moved.run("tp2"), tmp_path / "merged", pretrained_checkpoint=moved.base(base))
    assert not list(tmp_path.iterdir())


def test_output_that_exists_is_refused(moved: Moved, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=f"--output {tmp_path} exists already"):
        merge(moved.run("tp2"), tmp_path)


def test_method_that_cannot_be_merged_is_named(moved: Moved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(MERGERS, "lora")
    with pytest.raises(ConfigurationError, match="adapters of --peft-method lora cannot be merged"):
        merge(moved.run("tp2"), tmp_path / "merged")
