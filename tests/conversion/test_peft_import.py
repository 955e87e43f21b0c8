"""A LoRA made by HF PEFT computes here what it does there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megatron_peft.checkpoint.record import RunRecord, read_run_record
from megatron_peft.config import ConfigurationError
from megatron_peft.conversion.adapter_checkpoint import low_rank_factors, open_adapters
from megatron_peft.conversion.peft_import import import_adapter
from megatron_peft.conversion.verify import verify
from tests.conversion.adapter_runs import Moved
from tests.tiny_bloom import save_bloom
from tests.tiny_llama import save_llama

EVERY_LLAMA_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Q3 = "base_model.model.model.layers.3.self_attn.q_proj.lora_{}.weight"


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bases")
    save_llama(folder / "llama")
    save_llama(folder / "narrow", intermediate_size=152)
    save_bloom(folder / "bloom")
    return folder


def make_adapter(base: Path, folder: Path, safe_serialization: bool = True, **settings: Any) -> Path:
    """A LoRA of HF PEFT with random factors."""
    config = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **settings}
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), peft.LoraConfig(**config))
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in (p for name, p in model.named_parameters() if "lora_" in name):
            parameter.normal_(std=0.15)
    model.save_pretrained(folder, safe_serialization=safe_serialization)
    return folder


def imported(adapter: Path, base: Path) -> RunRecord:
    import_adapter(adapter, adapter.parent / "run", pretrained_checkpoint=base)
    return read_run_record(adapter.parent / "run")


@pytest.mark.parametrize(
    ("family", "settings", "rank", "targets"),
    [
        ("llama", {}, 8, {"linear_qkv"}),
        ("llama", {"target_modules": ["k_proj"]}, 4, {"linear_qkv"}),
        ("llama", {"target_modules": ["o_proj", "down_proj"]}, 4, {"linear_proj", "linear_fc2"}),
        (
            "llama",
            {"target_modules": EVERY_LLAMA_LINEAR, "use_rslora": True},
            12,
            {"linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"},
        ),
        (
            "llama",
            {"target_modules": ["up_proj", "gate_proj"], "layers_to_transform": [1, 2]},
            8,
            {"decoder.layers.1.mlp.linear_fc1", "decoder.layers.2.mlp.linear_fc1"},
        ),
        (
            "llama",
            {"target_modules": r"model\.layers\.[03]\.mlp\.(up|down)_proj", "exclude_modules": ["3.mlp.up_proj"]},
            4,
            {"decoder.layers.0.mlp.linear_fc1", "decoder.layers.0.mlp.linear_fc2", "decoder.layers.3.mlp.linear_fc2"},
        ),
        ("bloom", {"target_modules": ["query_key_value", "dense"]}, 4, {"linear_qkv", "linear_proj"}),
    ],
)
def test_imported_adapter_computes_what_it_does_in_peft(
    family: str, settings: dict[str, Any], rank: int, targets: set[str], bases: Path, tmp_path: Path
) -> None:
    adapter = make_adapter(bases / family, tmp_path / "adapter", **settings)
    record = imported(adapter, bases / family)
    assert record.config.peft.lora_rank == rank
    assert set(record.config.peft.target_modules) == targets
    assert record.config.peft.lora_scale == pytest.approx(6 / 2 if settings.get("use_rslora") else 6 / 4, rel=1e-12)
    assert verify(tmp_path / "run", adapter).logits.absolute < 1e-4
    assert verify(tmp_path / "run", bases / family).logits.absolute > 0.1


def test_flags_to_load_it_are_printed(bases: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = imported(make_adapter(bases / "llama", tmp_path / "adapter"), bases / "llama")
    printed = capsys.readouterr().out
    assert "so the rank is 8 instead of 4; alpha 12 keeps the scale of 1.5." in printed
    assert printed.endswith(
        "Load it with --finetune --peft-method lora --lora-rank 8 --lora-alpha 12 --peft-target-modules linear_qkv\n"
    )
    assert record.config.peft.lora_alpha == 12


def test_rank_that_stays_is_not_mentioned(bases: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = make_adapter(bases / "llama", tmp_path / "adapter", target_modules=["o_proj"], use_rslora=True)
    imported(adapter, bases / "llama")
    assert capsys.readouterr().out == (
        "Load it with --finetune --peft-method lora --lora-rank 4 --lora-alpha 6 --lora-rs --peft-target-modules "
        "linear_proj\n"
    )


def test_what_pads_the_rank_is_zero(bases: Path, tmp_path: Path) -> None:
    """o_proj needs rank 4 of the 8 that q_proj and v_proj take together: training leaves the others at zero."""
    adapter = make_adapter(bases / "llama", tmp_path / "adapter", target_modules=["q_proj", "v_proj", "o_proj"])
    imported(adapter, bases / "llama")
    factors = low_rank_factors(open_adapters(tmp_path / "run"), "decoder.layers.2.self_attention.linear_proj")
    assert factors.A.shape == (8, 120) and factors.B.shape == (96, 8)
    assert factors.A[:4].all() and factors.B[:, :4].all()
    assert not factors.A[4:].any() and not factors.B[:, 4:].any()


def test_export_and_import_give_the_run_back(moved: Moved) -> None:
    assert moved.came_back


def test_pickled_weights_are_read_without_running_anything(bases: Path, tmp_path: Path) -> None:
    adapter = make_adapter(bases / "llama", tmp_path / "adapter")
    weights = load_file(adapter / "adapter_model.safetensors")
    (adapter / "adapter_model.safetensors").unlink()
    torch.save(weights, adapter / "adapter_model.bin")
    imported(adapter, bases / "llama")
    assert verify(tmp_path / "run", adapter).logits.absolute < 1e-4
    torch.save({"run": exit}, adapter / "adapter_model.bin")
    with pytest.raises(ConfigurationError, match=r"adapter_model.bin cannot be read: it holds more than tensors"):
        import_adapter(adapter, tmp_path / "again", pretrained_checkpoint=bases / "llama")


@pytest.mark.parametrize(
    ("removed", "added", "message"),
    [
        (Q3.format("B"), {}, rf"1 missing: {Q3.format('B')}\."),
        (
            None,
            {"base_model.model.lm_head.lora_A.weight": torch.float32},
            "1 that belong to no targeted layer .*lm_head",
        ),
        (
            None,
            {Q3.format("A").replace("q_", "o_"): torch.float32},
            "1 that belong to no targeted layer .*o_proj.lora_A",
        ),
        (None, {Q3.format("A"): torch.int8}, "1 of an unsupported number type: .*q_proj.lora_A.weight I8"),
    ],
    ids=["missing", "no linear layer", "not targeted", "quantised"],
)
def test_tensors_that_do_not_fit_are_named(
    removed: str | None, added: dict[str, torch.dtype], message: str, bases: Path, tmp_path: Path
) -> None:
    adapter = make_adapter(bases / "llama", tmp_path / "adapter")
    weights = load_file(adapter / "adapter_model.safetensors")
    weights |= {name: torch.zeros(4, 96, dtype=dtype) for name, dtype in added.items()}
    weights.pop(removed, None)
    save_file(weights, adapter / "adapter_model.safetensors")
    with pytest.raises(ConfigurationError, match=message):
        import_adapter(adapter, tmp_path / "run", pretrained_checkpoint=bases / "llama")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("narrow", r"do not fit --pretrained-checkpoint .*narrow\. 4 of the wrong shape: .*lora_B.*\[160, 4\] instead"),
        (
            "bloom",
            r"target_modules \['gate_proj'\] of .* name no linear layer of --pretrained-checkpoint .*bloom: give",
        ),
    ],
)
def test_adapter_of_another_base_is_refused(base: str, message: str, bases: Path, tmp_path: Path) -> None:
    adapter = make_adapter(bases / "llama", tmp_path / "adapter", target_modules=["gate_proj"])
    with pytest.raises(ConfigurationError, match=message):
        import_adapter(adapter, tmp_path / "run", pretrained_checkpoint=bases / base)


def test_rank_that_a_layer_cannot_hold_is_refused(bases: Path, tmp_path: Path) -> None:
    adapter = make_adapter(bases / "llama", tmp_path / "adapter", r=50)
    with pytest.raises(ConfigurationError, match=r"takes --lora-rank 100 instead of 50; but .*linear_qkv has only 96"):
        import_adapter(adapter, tmp_path / "run", pretrained_checkpoint=bases / "llama")


def test_missing_base_output_and_files_are_named(bases: Path, tmp_path: Path) -> None:
    adapter = make_adapter(bases / "llama", tmp_path / "adapter")
    with pytest.raises(ConfigurationError, match="which base model\\? --pretrained-checkpoint takes the folder"):
        import_adapter(adapter, tmp_path / "run", pretrained_checkpoint=None)
    with pytest.raises(ConfigurationError, match=f"--output {adapter} exists already"):
        import_adapter(adapter, adapter, pretrained_checkpoint=bases / "llama")
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(ConfigurationError, match=r"holds neither adapter_model.safetensors nor adapter_model.bin"):
        import_adapter(adapter, tmp_path / "run", pretrained_checkpoint=bases / "llama")


def test_base_without_its_weights_is_refused(bases: Path, tmp_path: Path) -> None:
    adapter, base = make_adapter(bases / "llama", tmp_path / "adapter"), tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text((bases / "llama" / "config.json").read_text())
    with pytest.raises(ConfigurationError, match=r"--pretrained-checkpoint .*base holds no weights"):
        import_adapter(adapter, tmp_path / "run", pretrained_checkpoint=base)


def test_config_of_peft_is_not_needed_to_load(bases: Path, tmp_path: Path) -> None:
    """The folder has a run's own files."""
    adapter = make_adapter(bases / "llama", tmp_path / "adapter")
    record = imported(adapter, bases / "llama")
    assert (tmp_path / "run" / "latest_checkpointed_iteration.txt").read_text() == "0\n"
    config = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert config["method"] == "lora" and config["base_model_name_or_path"] == str(bases / "llama")
    assert record.position == {"iteration": 0, "consumed_samples": 0, "consumed_tokens": 0}
    assert set(record.base_fingerprint or ()) == {"config.json", "model.safetensors"}
    assert len(record.adapted_layers) == 4
