"""Two models on the same tokens: what is equal is seen to be, and what is not is found and placed."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from megatron_peft.config import ConfigurationError
from megatron_peft.conversion.convert import hf_to_megatron
from megatron_peft.conversion.verify import verify
from tests.tiny_llama import save_llama


@pytest.fixture(scope="module")
def original(saved_folders) -> Path:
    return saved_folders["single"]


def spoilt(original: Path, folder: Path, name: str, by: float = 1.1) -> Path:
    shutil.copytree(original, folder)
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {name: tensors[name] * by}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("kind", ["single", "tied"])
def test_ours_equals_transformers(kind, saved_folders, tmp_path):
    """Grouped queries, biases, head_dim, llama3 frequencies beyond the trained length."""
    found = verify(hf_to_megatron(saved_folders[kind], tmp_path / "megatron", progress=False), saved_folders[kind])
    assert found.logits.relative < 1e-5
    assert found.logits.scale > 1
    assert len(found.layers) == 3 and all(layer.relative < 1e-5 for layer in found.layers)
    assert found.same_best == found.num_positions > 40


def test_a_changed_layer_is_placed(original, tmp_path):
    other = spoilt(original, tmp_path / "other", "model.layers.1.mlp.down_proj.weight")
    found = verify(hf_to_megatron(original, tmp_path / "megatron", progress=False), other, num_tokens=20)
    assert found.logits.relative > 1e-3
    assert [layer.relative > 1e-3 for layer in found.layers] == [False, True, True]
    assert 0 < found.same_best < found.num_positions == 40


def test_two_hugging_face_folders_are_compared(original, tmp_path):
    other = spoilt(original, tmp_path / "other", "lm_head.weight")
    found = verify(other, original, num_tokens=8)
    assert found.logits.relative == pytest.approx(0.1, rel=1e-3)
    assert all(layer.absolute == 0 for layer in found.layers)


def test_logits_that_are_not_finite_are_not_compared(original, tmp_path):
    other = spoilt(original, tmp_path / "other", "lm_head.weight", by=float("nan"))
    with pytest.raises(ConfigurationError, match=f"--reference {other}: its logits are NaN"):
        verify(original, other, num_tokens=4)


def test_what_cannot_be_compared_is_told(original, tmp_path):
    other, empty, adapter = save_llama(tmp_path / "other"), tmp_path / "empty", tmp_path / "adapter"
    empty.mkdir(), adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "moved"}')
    for ours, theirs, num_tokens, told in (
        (original, other, 4, "not comparable: vocab_size 101 and 1001"),
        *((original, original, n, f"--num-tokens {n} must be at least 1 and at most 256") for n in (0, 257)),
        (original, empty, 4, f"--reference {empty} holds no model"),
        (adapter, original, 4, f"the base model moved of --input {adapter} is not there"),
    ):
        with pytest.raises(ConfigurationError, match=told):
            verify(ours, theirs, num_tokens=num_tokens)


def test_as_many_tokens_are_compared_as_the_shorter_model_takes(original, tmp_path):
    shorter = Path(shutil.copytree(original, tmp_path / "shorter"))
    config = json.loads((shorter / "config.json").read_text())
    (shorter / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 20}))
    for pair in ((original, shorter), (shorter, original)):
        assert verify(*pair, num_tokens=20).num_positions == 40
        with pytest.raises(ConfigurationError, match="--num-tokens 21 must be at least 1 and at most 20"):
            verify(*pair, num_tokens=21)


@pytest.mark.parametrize("change", [lambda weights: weights.write_bytes(weights.read_bytes()[:-9]), Path.unlink])
def test_what_the_library_that_should_cannot_open_is_told(change, original, tmp_path):
    folder = Path(shutil.copytree(original, tmp_path / "other"))
    change(folder / "model.safetensors")
    with pytest.raises(ConfigurationError, match="transformers cannot open .*other"):
        verify(original, folder, num_tokens=4)
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "moved"}')
    with pytest.raises(ConfigurationError, match="base model .* is not there: give its folder with --pretrained-check"):
        verify(original, folder, num_tokens=4)
    with pytest.raises(ConfigurationError, match="HF PEFT cannot open .*other"):
        verify(original, folder, num_tokens=4, pretrained_checkpoint=original)
