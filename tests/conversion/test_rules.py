"""Rules know every tensor, go both ways bit for bit at any tensor-parallel size, and read a rank's own bytes only."""

import dataclasses
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_peft.config import ConfigurationError
from megatron_peft.conversion.pretrained import base_parameters, open_weights
from megatron_peft.models.families import FAMILIES, family_of, read_shape, rules_for
from megatron_peft.models.rules import HFTensor, Index, Rule, VocabularyRows, expected_tensors
from megatron_peft.models.shape import ModelShape
from tests.conversion.megatron_folders import bloom_shapes, llama_shapes, stage, tensors_of
from tests.conversion.test_pretrained import load
from tests.tiny_bloom import save_bloom

SMALL = ModelShape("llama", 1, 5, 6, 2, 2, 4, 10, 64)


def test_a_family_that_is_not_registered_is_refused():
    told = "model family 'gpt' is not supported. Supported: llama, bloom.*; docs/new-model.md adds one"
    with pytest.raises(ConfigurationError, match=told):
        rules_for(dataclasses.replace(SMALL, architecture="gpt"))
    with pytest.raises(ConfigurationError, match=r"a model's shape cannot have architecture \['llama'\]"):
        dataclasses.replace(SMALL, architecture=["llama"])


@pytest.mark.parametrize("family", FAMILIES)
def test_rules_are_found_by_megatron_name_and_name_what_targets_go_by(family):
    rules = rules_for(ModelShape(family, 1, 24, 96, 2, 2, 12, 10, 64))
    assert all(name == rule.name for name, rule in rules.items())
    pairs = [(part, rule.layer) for rule in rules.values() if rule.is_linear for part in rule.modules]
    assert {part.rpartition(".")[2]: layer.rpartition(".")[2] for part, layer in pairs} == family_of(family).modules


@pytest.mark.parametrize("kind", ["single", "tied", "bloom", "untied bloom"])
def test_table_has_every_tensor_that_transformers_saves_and_nothing_else(kind, saved_folders, tmp_path):
    is_bloom = "bloom" in kind
    folder = save_bloom(tmp_path, tie_word_embeddings=kind == "bloom", n_layer=2) if is_bloom else saved_folders[kind]
    saved = {name: tuple(tensor.shape) for name, tensor in tensors_of(folder).items()}
    rules = rules_for(read_shape(folder))
    assert expected_tensors(rules) == saved
    assert ("lm_head.weight" in saved) == (kind in ("single", "untied bloom"))
    if kind in ("tied", "bloom"):  # the output layer is read from the embedding
        assert rules["output_layer.weight"].hf_tensors == rules["embedding.word_embeddings.weight"].hf_tensors


class TensorsInMemory(dict[str, Tensor]):
    """A source that counts the numbers asked for."""

    numbers_read = 0

    def slice(self, name: str, index: Index) -> Tensor:
        view = self[name][index]
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


@settings(max_examples=40)
@given(st.integers(1, 4), st.sampled_from([llama_shapes, bloom_shapes]), st.integers(0, 5), st.data())
def test_round_trip_is_exact_and_reads_each_number_once(size, shapes, padding, data):
    rules = rules_for(data.draw(shapes(size)))
    original = numbered_tensors(rules)
    for rule in rules.values():
        source = TensorsInMemory(original)
        locals_ = local_tensors(rule, source, size, padding)
        written = rule.write(locals_)
        assert all(torch.equal(written[part.name], original[part.name]) for part in rule.hf_tensors)
        assert not any(local.isnan().any() for local in locals_)
        is_copied = type(rule).__name__ == "Replicated"
        assert not is_copied or all(torch.equal(local, locals_[0]) for local in locals_)
        copies = size if is_copied else 1
        assert source.numbers_read == copies * sum(original[part.name].numel() for part in rule.hf_tensors)


def test_padded_vocabulary_rows_are_zero_on_ranks_with_none_of_the_vocabulary_too():
    rule = VocabularyRows("embedding.word_embeddings.weight", (HFTensor("e", (5, 3)),))
    embedding = torch.arange(1.0, 16, dtype=torch.float64).view(5, 3)
    locals_ = local_tensors(rule, TensorsInMemory({"e": embedding}), 4, vocabulary_padding=2)
    assert [local.shape for local in locals_] == [(4, 3)] * 4
    padded = torch.cat(locals_)
    assert torch.equal(padded[:5], embedding)
    assert padded[5:].eq(0).all()


def test_a_whole_tensor_is_written_without_a_copy():
    whole = torch.zeros(12, 5)  # padded
    (written,) = rules_for(SMALL)["output_layer.weight"].write([whole]).values()
    assert written.shape == (10, 5) and written.data_ptr() == whole.data_ptr()


def loaded(folder: Path) -> dict[str, Tensor]:
    shape = read_shape(folder)
    chunk = stage(shape, 1, range(shape.num_layers))
    load(chunk, folder, shape)
    return dict(base_parameters(chunk))


def test_names_without_the_prefix_load_the_same_bloom(tmp_path_factory, tmp_path):
    """As in bigscience's files, also with a tied copy and one prefixed name. A missing one has transformers' name."""
    bloom = save_bloom(tmp_path_factory.mktemp("bloom"))
    tensors = load_file(bloom / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    bare["transformer.ln_f.weight"] = bare.pop("ln_f.weight")
    bare["lm_head.weight"] = bare["word_embeddings.weight"].clone()
    shutil.copy(bloom / "config.json", tmp_path)
    save_file(bare, tmp_path / "model.safetensors")
    expected, found = loaded(bloom), loaded(tmp_path)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert torch.equal(found["embedding.word_embeddings_layernorm.bias"], bare["word_embeddings_layernorm.bias"])
    _, weights = open_weights(tmp_path, read_shape(tmp_path))
    assert weights.counts.reads > 0 and pickle.loads(pickle.dumps(weights)), (
        "other ranks receive it, without open files"
    )
    del tensors["transformer.h.1.mlp.dense_h_to_4h.bias"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ConfigurationError, match="1 missing: transformer.h.1.mlp.dense_h_to_4h.bias"):
        loaded(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda output: torch.cat([output[:-1], output[-1:] + 1]), id="another last row"),
        pytest.param(lambda output: output[:-1].clone(), id="fewer rows"),
    ],
)
def test_an_output_layer_of_its_own_is_not_lost_in_a_folder_that_is_called_tied(change, tmp_path):
    bloom = save_bloom(tmp_path)
    tensors = load_file(bloom / "model.safetensors")
    tensors["lm_head.weight"] = change(tensors["transformer.word_embeddings.weight"])
    save_file(tensors, bloom / "model.safetensors")
    told = 'lm_head.weight of its own, which is not the embedding.*"tie_word_embeddings" to false'
    with pytest.raises(ConfigurationError, match=told):
        loaded(bloom)
