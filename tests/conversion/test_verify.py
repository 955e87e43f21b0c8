"""Two models on the same tokens: what is equal is seen to be, and what is not is found and placed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_peft.config import ConfigurationError
from megatron_peft.conversion.to_megatron import hf_to_megatron
from megatron_peft.conversion.verify import Comparison, Trace, compare, verify
from tests.tiny_llama import save_llama


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    return save_llama(tmp_path_factory.mktemp("verify") / "llama")


@pytest.fixture(scope="module")
def converted(original: Path) -> Path:
    return hf_to_megatron(original, original.parent / "megatron", progress=False)


def spoilt(original: Path, folder: Path, name: str) -> Path:
    shutil.copytree(original, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = tensors[name] * 1.1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_ours_equals_transformers(original: Path, converted: Path) -> None:
    found = verify(converted, original, num_tokens=20)
    assert found.logits.relative < 1e-5
    assert found.logits.scale > 1
    assert len(found.layers) == 4 and all(layer.relative < 1e-5 for layer in found.layers)
    assert (found.same_best, found.num_positions) == (40, 40)


def test_a_changed_layer_is_placed(original: Path, converted: Path, tmp_path: Path) -> None:
    other = spoilt(original, tmp_path / "other", "model.layers.2.mlp.down_proj.weight")
    found = verify(converted, other, num_tokens=20)
    assert found.logits.relative > 1e-3
    assert [layer.relative > 1e-3 for layer in found.layers] == [False, False, True, True]


def test_two_hugging_face_folders_are_compared(original: Path, tmp_path: Path) -> None:
    other = spoilt(original, tmp_path / "other", "lm_head.weight")
    found = verify(other, original, num_tokens=8)
    assert found.logits.relative == pytest.approx(0.1, rel=1e-3)
    assert all(layer.absolute == 0 for layer in found.layers)


def test_models_of_other_sizes_are_not_comparable(original: Path, tmp_path: Path) -> None:
    other = save_llama(tmp_path / "other", num_hidden_layers=3)
    with pytest.raises(ConfigurationError, match="not comparable: num_layers 4 and 3"):
        verify(original, other)


@pytest.mark.parametrize("num_tokens", [0, 257])
def test_tokens_beyond_the_trained_length_are_refused(original: Path, num_tokens: int) -> None:
    with pytest.raises(ConfigurationError, match=f"--num-tokens {num_tokens} must be at least 1 and at most 256"):
        verify(original, original, num_tokens=num_tokens)


def test_no_folder_at_all_is_named(original: Path, tmp_path: Path) -> None:
    nowhere, empty = tmp_path / "nowhere", tmp_path / "empty"
    with pytest.raises(ConfigurationError, match=f"^--input {nowhere} is not a folder"):
        verify(nowhere, original)
    with pytest.raises(ConfigurationError, match=f"^--reference {nowhere} is not a folder"):
        verify(original, nowhere)
    empty.mkdir()
    with pytest.raises(ConfigurationError, match=f"^--reference {empty} holds no model"):
        verify(original, empty)


def test_a_lost_base_is_asked_for(original: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "moved"}')
    with pytest.raises(ConfigurationError, match=f"^the base model moved of --input {adapter} is not there"):
        verify(adapter, original)


def test_comparison_of_traces() -> None:
    logits = torch.tensor([[[1.0, -4.0], [0.0, 2.0]]])
    other = torch.tensor([[[1.5, -4.0], [3.0, 2.0]]])
    found = compare(Trace(other, [other]), Trace(logits, [logits]))
    assert isinstance(found, Comparison)
    assert (found.logits.absolute, found.logits.scale, found.logits.relative) == (3.0, 4.0, 0.75)
    assert found.layers == [found.logits]
    assert (found.same_best, found.num_positions) == (1, 2)


def broken(original: Path, folder: Path, change: str) -> Path:
    """A folder that the library that should open it cannot."""
    shutil.copytree(original, folder)
    weights, config = folder / "model.safetensors", folder / "adapter_config.json"
    if change == "truncated":
        weights.write_bytes(weights.read_bytes()[:-9])
    elif change == "no weights":
        weights.unlink()
    else:
        weights.unlink()
        config.write_text({"no JSON": "{", "no base": '{"peft_type": "LORA"}'}[change])
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("truncated", "transformers cannot open .*other"),
        ("no weights", "transformers cannot open .*other"),
        ("no JSON", "adapter_config.json is not JSON"),
        ("no base", "the base model .* is not there: give its folder with --pretrained-checkpoint"),
    ],
)
def test_what_cannot_be_opened_is_told(original: Path, tmp_path: Path, change: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        verify(original, broken(original, tmp_path / "other", change), num_tokens=4)
    if change == "no base":
        with pytest.raises(ConfigurationError, match="HF PEFT cannot open .*other"):
            verify(original, tmp_path / "other", num_tokens=4, pretrained_checkpoint=original)
