"""Megatron's checkpoints under all the names and places that it gives them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_peft.config import ConfigurationError
from megatron_peft.conversion.families import rules_for
from megatron_peft.conversion.megatron_weights import MegatronWeights, open_megatron, spellings
from megatron_peft.conversion.to_huggingface import megatron_to_hf
from tests.conversion.megatron_folders import ODD, equal, global_tensors, save_distributed, save_random, tensors_of


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    return save_random(tmp_path_factory.mktemp("hf") / "odd")


def stacked(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """All layers of a parameter as one tensor, as megatron-core stores uniform layers by default."""
    layers: dict[str, list[Tensor]] = {}
    for name, tensor in tensors.items():
        prefix, _, rest = name.partition("decoder.layers.")
        key = f"decoder.layers.{rest.partition('.')[2]}" if rest else prefix
        layers.setdefault(key, []).append(tensor)
    return {key: torch.stack(found) if key.startswith("decoder.layers.") else found[0] for key, found in layers.items()}


def fused_norms(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names of a model with Transformer Engine's layers."""
    return {list(spellings(name))[-1]: tensor for name, tensor in tensors.items()}


def check(tensors: dict[str, Tensor], folder: Path) -> MegatronWeights:
    weights = open_megatron(save_distributed(folder, tensors))
    weights.check(rules_for(ODD))
    return weights


@pytest.mark.parametrize("form", [stacked, fused_norms, lambda tensors: stacked(fused_norms(tensors))])
def test_every_spelling_is_read(form, original: Path, tmp_path: Path) -> None:
    state = {"layers._extra_state": torch.zeros(1), "optimizer.state.exp_avg.a": torch.zeros(1)}
    tensors = form(global_tensors(original)) | state | {"chained_0.optimizer.x": torch.zeros(1)}
    save_distributed(tmp_path / "megatron", tensors)
    written = megatron_to_hf(tmp_path / "megatron", tmp_path / "hf", pretrained_checkpoint=original, progress=False)
    assert equal(tensors_of(written), tensors_of(original))


def test_spellings_of_a_norm() -> None:
    assert list(spellings("decoder.layers.3.pre_mlp_layernorm.bias")) == [
        "decoder.layers.3.pre_mlp_layernorm.bias",
        "decoder.layers.3.mlp.linear_fc1.layer_norm_bias",
    ]
    assert list(spellings("decoder.final_layernorm.weight")) == ["decoder.final_layernorm.weight"]


def test_all_faults_are_told_at_once(original: Path, tmp_path: Path) -> None:
    tensors = global_tensors(original)
    del tensors["decoder.final_layernorm.weight"]
    tensors["decoder.layers.1.mlp.linear_fc2.bias"] = torch.zeros(9)
    tensors["decoder.layers.4.mlp.linear_fc2.bias"] = torch.zeros(10)
    tensors["output_layer.weight"] = torch.zeros(22, 10)
    with pytest.raises(ConfigurationError) as raised:
        check(tensors, tmp_path / "megatron")
    told = str(raised.value)
    assert "1 missing: decoder.final_layernorm.weight" in told
    assert "1 not part of this model: decoder.layers.4.mlp.linear_fc2.bias" in told
    assert "2 of the wrong shape" in told
    assert "output_layer.weight [22, 10] instead of [23, 10]" in told


def test_a_stack_of_more_layers_is_another_model(original: Path, tmp_path: Path) -> None:
    tensors = stacked(global_tensors(original))
    tensors["decoder.layers.mlp.linear_fc2.bias"] = torch.zeros(5, 10)
    with pytest.raises(ConfigurationError, match="not part of this model: decoder.layers.4.mlp.linear_fc2.bias"):
        check(tensors, tmp_path / "megatron")


def test_bytes_read_are_counted(original: Path, tmp_path: Path) -> None:
    weights = check(global_tensors(original), tmp_path / "megatron")
    weights.read(rules_for(ODD)["decoder.final_layernorm.weight"], torch.zeros(10), 0, 1)
    assert weights.bytes_read == 40
