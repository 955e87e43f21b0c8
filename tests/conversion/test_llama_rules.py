"""The Llama table knows every tensor that transformers saves, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors import safe_open

from megatron_peft.conversion.llama_rules import llama_rules
from megatron_peft.conversion.rules import expected_tensors
from megatron_peft.models.huggingface import read_shape


@pytest.mark.parametrize("kind", ["single", "tied"])
def test_table_is_complete(saved_folders: dict[str, Path], kind: str) -> None:
    rules = {rule.name: rule for rule in llama_rules(read_shape(saved_folders[kind]))}
    with safe_open(saved_folders[kind] / "model.safetensors", framework="pt") as file:
        saved = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    assert expected_tensors(rules) == saved


def test_biases_follow_the_shape(saved_folders: dict[str, Path]) -> None:
    shape = read_shape(saved_folders["single"])
    biased = {rule.name for rule in llama_rules(shape) if rule.name.endswith("bias")}
    modules = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
    assert biased == {f"decoder.layers.{layer}.{module}.bias" for layer in range(3) for module in modules}


def test_a_tied_output_layer_is_read_from_the_embedding(saved_folders: dict[str, Path]) -> None:
    rules = {rule.name: rule for rule in llama_rules(read_shape(saved_folders["tied"]))}
    assert rules["output_layer.weight"].parts == rules["embedding.word_embeddings.weight"].parts
