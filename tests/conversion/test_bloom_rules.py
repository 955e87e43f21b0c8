"""The Bloom table: complete, exact both ways, and the names of a model saved without its output layer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from megatron_peft.config import ConfigurationError, ModelConfig, ParallelConfig
from megatron_peft.conversion.families import rules_for
from megatron_peft.conversion.loader import base_parameters, load_pretrained
from megatron_peft.conversion.rules import Replicated, expected_tensors
from megatron_peft.models.gpt import build_model_chunks
from megatron_peft.models.huggingface import read_shape
from megatron_peft.models.shape import ModelShape
from tests.conversion.test_rules import TensorsInMemory, local_tensors, numbered_tensors
from tests.one_rank import one_rank
from tests.tiny_bloom import save_bloom


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_bloom(tmp_path_factory.mktemp("bloom"))


@pytest.mark.parametrize("tied", [True, False])
def test_table_is_complete(tied: bool, tmp_path: Path) -> None:
    save_bloom(tmp_path, tie_word_embeddings=tied, n_layer=2)
    saved = {name: tuple(tensor.shape) for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    assert expected_tensors(rules_for(read_shape(tmp_path))) == saved
    assert ("lm_head.weight" in saved) != tied


@st.composite
def bloom_shapes(draw: st.DrawFn) -> tuple[ModelShape, int]:
    """A Bloom of odd shape, and a tensor-parallel size that divides it."""
    size = draw(st.integers(1, 4))
    heads, dim = size * draw(st.integers(1, 3)), draw(st.integers(1, 5))
    shape = ModelShape(
        architecture="bloom",
        num_layers=draw(st.integers(1, 2)),
        hidden_size=heads * dim,
        ffn_hidden_size=4 * heads * dim,
        num_attention_heads=heads,
        num_query_groups=heads,
        kv_channels=dim,
        vocab_size=draw(st.integers(1, 23)),
        max_position_embeddings=64,
        tied_embeddings=draw(st.booleans()),
    )
    return shape, size


@given(bloom_shapes(), st.integers(0, 5))
def test_round_trip_is_exact(shape_and_size: tuple[ModelShape, int], padding: int) -> None:
    shape, size = shape_and_size
    rules = rules_for(shape)
    original = numbered_tensors(rules)
    for rule in rules.values():
        locals_ = local_tensors(rule, TensorsInMemory(original), size, padding)
        assert not any(local.isnan().any() for local in locals_)
        assert all(torch.equal(written, original[name]) for name, written in rule.write(locals_).items())
        if isinstance(rule, Replicated):
            assert all(torch.equal(local, locals_[0]) for local in locals_)


def test_linear_qkv_is_a_plain_slice_of_whole_heads() -> None:
    shape = ModelShape("bloom", 1, 12, 48, 6, 6, 2, 10, 64)
    rules = rules_for(shape)
    tensors = numbered_tensors(rules)
    fused = tensors["transformer.h.0.self_attention.query_key_value.weight"]
    ranks = local_tensors(rules["decoder.layers.0.self_attention.linear_qkv.weight"], TensorsInMemory(tensors), 3)
    assert all(torch.equal(local, fused[12 * rank : 12 * rank + 12]) for rank, local in enumerate(ranks))
    with pytest.raises(ConfigurationError, match="6 .*heads cannot be split over --tensor-model-parallel-size 4"):
        rules["decoder.layers.0.self_attention.linear_qkv.weight"].local_shape(4)


def _loaded(folder: Path) -> dict[str, torch.Tensor]:
    shape = read_shape(folder)
    with one_rank():
        (chunk,) = chunks = build_model_chunks(shape, ModelConfig(str(folder)), ParallelConfig())
        for parameter in chunk.parameters():
            parameter.data.fill_(torch.nan)
        load_pretrained(chunks, folder, shape, tensor_parallel_rank=0, tensor_parallel_size=1, progress=False)
        return {name: parameter.detach() for name, parameter in base_parameters(chunk)}


def test_names_without_the_prefix_load_the_same_model(folder: Path, tmp_path: Path) -> None:
    """As in bigscience's own files; one of them may hold a copy of the tied output layer too."""
    tensors = load_file(folder / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    bare["lm_head.weight"] = bare["word_embeddings.weight"].clone()
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    save_file(bare, tmp_path / "model.safetensors")
    expected, found = _loaded(folder), _loaded(tmp_path)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert torch.equal(found["embedding.word_embeddings_layernorm.bias"], bare["word_embeddings_layernorm.bias"])


def test_a_missing_tensor_is_named_as_transformers_names_it(folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["transformer.h.1.mlp.dense_h_to_4h.bias"]
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ConfigurationError, match="1 missing: transformer.h.1.mlp.dense_h_to_4h.bias"):
        _loaded(tmp_path)


def test_names_are_chosen_one_by_one(folder: Path) -> None:
    shape = replace(read_shape(folder), tied_embeddings=False)
    rules = rules_for(shape, stored=["ln_f.bias", "lm_head.weight", "transformer.ln_f.weight", "ln_f.weight"])
    names = {name: rules[f"decoder.final_layernorm.{name}"].parts[0].name for name in ("weight", "bias")}
    assert names == {"weight": "transformer.ln_f.weight", "bias": "ln_f.bias"}
    assert rules["output_layer.weight"].parts[0].name == "lm_head.weight"
