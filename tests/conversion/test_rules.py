"""Rules go both ways bit for bit, at any tensor-parallel size, and read a rank's own bytes only."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megatron_peft.config import ConfigurationError
from megatron_peft.conversion.families import rules_for
from megatron_peft.conversion.rules import FusedRows, Index, Part, Rule, VocabularyRows, expected_tensors
from megatron_peft.models.shape import ModelShape


class TensorsInMemory:
    """A source that counts the numbers asked for."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors, self.numbers_read = tensors, 0

    def slice(self, name: str, index: Index) -> Tensor:
        view = self.tensors[name][index]
        self.numbers_read += view.numel()
        return view


def numbered_tensors(rules: dict[str, Rule]) -> dict[str, Tensor]:
    """Expected tensors in which no number occurs twice."""
    tensors, first = {}, 1
    for name, shape in expected_tensors(rules).items():
        last = first + torch.Size(shape).numel()
        tensors[name], first = torch.arange(first, last, dtype=torch.float64).view(shape), last
    return tensors


def local_tensors(rule: Rule, source: TensorsInMemory, size: int, vocabulary_padding: int = 0) -> list[Tensor]:
    """The parameter on each of `size` ranks, read into memory full of NaN."""
    rows, *columns = rule.local_shape(size)
    rows += vocabulary_padding if isinstance(rule, VocabularyRows) else 0
    locals_ = [torch.full((rows, *columns), torch.nan, dtype=torch.float64) for _ in range(size)]
    for rank, local in enumerate(locals_):
        rule.read(local, source, rank, size)
    return locals_


@st.composite
def llama_shapes(draw: st.DrawFn) -> tuple[ModelShape, int]:
    """A Llama of odd shape, and a tensor-parallel size that divides it."""
    size = draw(st.integers(1, 4))
    groups = size * draw(st.integers(1, 2))
    linears = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
    shape = ModelShape(
        architecture="llama",
        num_layers=draw(st.integers(1, 2)),
        hidden_size=draw(st.integers(1, 7)),
        ffn_hidden_size=size * draw(st.integers(1, 5)),
        num_attention_heads=groups * draw(st.integers(1, 3)),
        num_query_groups=groups,
        kv_channels=draw(st.sampled_from([2, 4, 6])),
        vocab_size=draw(st.integers(1, 23)),
        max_position_embeddings=64,
        linear_biases=frozenset(draw(st.sets(st.sampled_from(linears)))),
        tied_embeddings=draw(st.booleans()),
    )
    return shape, size


@given(llama_shapes(), st.integers(0, 5))
def test_round_trip_is_exact_and_reads_each_number_once(shape_and_size: tuple[ModelShape, int], padding: int) -> None:
    shape, size = shape_and_size
    rules = rules_for(shape)
    original = numbered_tensors(rules)
    for rule in rules.values():
        source = TensorsInMemory(original)
        locals_ = local_tensors(rule, source, size, padding)
        written = rule.write(locals_)
        assert all(torch.equal(written[part.name], original[part.name]) for part in rule.parts)
        assert not any(local.isnan().any() for local in locals_)
        copies = size if type(rule).__name__ == "Replicated" else 1
        assert source.numbers_read == copies * sum(original[part.name].numel() for part in rule.parts)


@pytest.mark.parametrize("size", [1, 2])
def test_linear_qkv_holds_queries_keys_and_values_of_each_group(size: int) -> None:
    heads, groups, dim, hidden = 6, 2, 4, 5
    shape = ModelShape("llama", 1, hidden, 8, heads, groups, dim, 10, 64, linear_biases=frozenset({"linear_qkv"}))
    rules = rules_for(shape)
    tensors = numbered_tensors(rules)
    for kind in ("weight", "bias"):
        q, k, v = (tensors[f"model.layers.0.self_attn.{p}_proj.{kind}"] for p in "qkv")
        rows = []
        for group in range(groups):
            for head in range(group * heads // groups, (group + 1) * heads // groups):
                rows.append(q[head * dim : (head + 1) * dim])
            rows += [k[group * dim : (group + 1) * dim], v[group * dim : (group + 1) * dim]]
        rule = rules[f"decoder.layers.0.self_attention.linear_qkv.{kind}"]
        fused = torch.cat(local_tensors(rule, TensorsInMemory(tensors), size))
        assert torch.equal(fused, torch.cat(rows))


def test_linear_fc1_holds_its_share_of_the_gate_above_that_of_up() -> None:
    rules = rules_for(ModelShape("llama", 1, 5, 6, 2, 2, 4, 10, 64))
    tensors = numbered_tensors(rules)
    gate, up = (tensors[f"model.layers.0.mlp.{name}_proj.weight"] for name in ("gate", "up"))
    first, second = local_tensors(rules["decoder.layers.0.mlp.linear_fc1.weight"], TensorsInMemory(tensors), 2)
    assert torch.equal(first, torch.cat([gate[:3], up[:3]]))
    assert torch.equal(second, torch.cat([gate[3:], up[3:]]))


def test_row_parallel_weights_are_split_by_columns() -> None:
    rules = rules_for(ModelShape("llama", 1, 5, 6, 2, 2, 4, 10, 64))
    tensors = numbered_tensors(rules)
    down = tensors["model.layers.0.mlp.down_proj.weight"]
    locals_ = local_tensors(rules["decoder.layers.0.mlp.linear_fc2.weight"], TensorsInMemory(tensors), 3)
    assert torch.equal(torch.cat(locals_, dim=1), down)
    assert locals_[1].shape == (5, 2)


def test_padded_vocabulary_rows_are_zero_on_ranks_with_none_of_the_vocabulary_too() -> None:
    rule = VocabularyRows("embedding.word_embeddings.weight", (Part("e", (5, 3)),))
    embedding = torch.arange(1.0, 16, dtype=torch.float64).view(5, 3)
    locals_ = local_tensors(rule, TensorsInMemory({"e": embedding}), 4, vocabulary_padding=2)
    assert [local.shape for local in locals_] == [(4, 3)] * 4
    padded = torch.cat(locals_)
    assert torch.equal(padded[:5], embedding)
    assert padded[5:].eq(0).all()


def test_reading_converts_to_the_type_of_the_parameter() -> None:
    rule = VocabularyRows("output_layer.weight", (Part("e", (2, 2)),))
    local = torch.zeros(2, 2, dtype=torch.bfloat16)
    rule.read(local, TensorsInMemory({"e": torch.full((2, 2), 1 / 3)}), 0, 1)
    assert torch.equal(local, torch.full((2, 2), 1 / 3).bfloat16())


@pytest.mark.parametrize(
    ("name", "size", "told"),
    [
        ("self_attention.linear_qkv.weight", 4, "2 key-value heads .*--tensor-model-parallel-size 4"),
        ("mlp.linear_fc1.weight", 4, "6 rows of model.layers.0.mlp.gate_proj.weight .*--tensor-model-parallel-size 4"),
        ("mlp.linear_fc2.weight", 4, "6 input features .*--tensor-model-parallel-size 4"),
    ],
)
def test_a_size_that_does_not_divide_is_named(name: str, size: int, told: str) -> None:
    rule = rules_for(ModelShape("llama", 1, 5, 6, 6, 2, 4, 10, 64))[f"decoder.layers.0.{name}"]
    with pytest.raises(ConfigurationError, match=told):
        rule.local_shape(size)


def test_only_the_vocabulary_may_have_rows_to_spare() -> None:
    embedding = VocabularyRows("e", (Part("e", (5, 3)),))
    assert embedding.accepts((3, 3), size=2) and embedding.accepts((64, 3), size=2)
    assert not embedding.accepts((2, 3), size=2) and not embedding.accepts((64, 4), size=2)
    fused = FusedRows("f", (Part("f", (6, 3)),), num_groups=None)
    assert fused.accepts((3, 3), size=2) and not fused.accepts((4, 3), size=2)


def test_a_whole_tensor_is_written_without_a_copy() -> None:
    rules = rules_for(ModelShape("llama", 1, 5, 6, 2, 2, 4, 10, 64))
    whole = torch.zeros(12, 5)  # padded
    (written,) = rules["output_layer.weight"].write([whole]).values()
    assert written.shape == (10, 5) and written.data_ptr() == whole.data_ptr()
