"""A Hugging Face folder becomes what megatron-core itself would have saved, and never lies in memory whole."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_peft.checkpoint.tensors import load_parameters, read_index, sharded_parameters, stored_shapes
from megatron_peft.config import ConfigurationError
from megatron_peft.conversion import convert
from megatron_peft.conversion.convert import ShardSlice, hf_to_megatron
from megatron_peft.conversion.hf_files import Source
from megatron_peft.conversion.megatron_files import open_distributed
from megatron_peft.conversion.pretrained import load_pretrained
from megatron_peft.models.shape import ModelShape
from tests.conversion.megatron_folders import ODD, save_random, tensors_of
from tests.one_rank import one_rank
from tests.tiny_gpt import SIZES, tiny_gpt


@pytest.fixture
def original(tmp_path: Path) -> Path:
    return save_random(tmp_path / "odd")


@pytest.mark.parametrize("changes", [{}, {"tied_embeddings": True}, {"linear_biases": ODD.linear_biases}])
def test_megatron_core_reads_its_own_keys_and_shapes(changes, tmp_path):
    shape = ModelShape(**SIZES | changes)
    original = save_random(tmp_path / "hf", shape)
    folder = hf_to_megatron(original, tmp_path / "megatron", progress=False)
    with one_rank():
        loaded, expected = tiny_gpt(changes), tiny_gpt(changes)
        entries = sharded_parameters([loaded], only_adapters=False)
        assert {entry.key for entry in entries} == stored_shapes(read_index(folder)).keys()
        load_parameters(entries, folder)
        load_pretrained([expected], original, shape, tensor_parallel_rank=0, tensor_parallel_size=1, progress=False)
        for (name, parameter), other in zip(loaded.named_parameters(), expected.parameters(), strict=True):
            assert torch.equal(parameter, other), name
    assert torch.serialization.get_crc32_options(), "a setting of torch that is another one while files are written"


def test_a_tensor_is_written_as_shards_that_ranks_read(original, tmp_path, monkeypatch):
    stored = open_distributed(hf_to_megatron(original, tmp_path / "megatron", progress=False))
    assert len(stored["decoder.layers.0.self_attention.linear_qkv.weight"].slices) == 2  # key-value heads
    assert len(stored["decoder.layers.0.mlp.linear_fc1.weight"].slices) == 2 * 4  # gate and up, 12 rows each
    assert [box.shape for box in stored["decoder.layers.0.mlp.linear_fc2.weight"].slices] == [(10, 3)] * 4
    assert len(stored["embedding.word_embeddings.weight"].slices) == 8
    assert len(stored["decoder.final_layernorm.weight"].slices) == 1
    monkeypatch.setattr(convert, "MIN_SHARD_BYTES", 2**20)
    stored = open_distributed(hf_to_megatron(original, tmp_path / "uncut", progress=False))
    assert len(stored["embedding.word_embeddings.weight"].slices) == 1


def test_one_slice_is_held_at_a_time(original, tmp_path, monkeypatch):
    made: list[Tensor] = []
    read = ShardSlice.read

    def watched(part: ShardSlice, source: Source) -> Tensor:
        held = sum(values.untyped_storage().nbytes() > 0 for values in made)
        assert held == 0, f"{held} slices are held"
        values = read(part, source)
        assert values.untyped_storage().nbytes() == values.nbytes, "torch's writer clones a part of a storage"
        made.append(values)
        return values

    monkeypatch.setattr(ShardSlice, "read", watched)
    hf_to_megatron(original, tmp_path / "megatron", progress=False)
    assert len(made) > 60


def test_nothing_in_a_folder_depends_on_where_or_when_it_was_written(original, tmp_path):
    first, second = (hf_to_megatron(original, tmp_path / name, progress=False) for name in ("first", "second"))
    names = {path.name for path in first.iterdir()}
    assert names >= {".metadata", "__0_0.distcp", "common.pt", "config.json", "metadata.json"}
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in names)


def test_vocabulary_is_padded_with_zeros(original, tmp_path):
    folder = hf_to_megatron(original, tmp_path / "megatron", make_vocab_size_divisible_by=16, progress=False)
    stored = open_distributed(folder)["embedding.word_embeddings.weight"]
    embedding = torch.full((32, 10), torch.nan)
    stored.fill(embedding, (0, 0))
    assert stored.shape == (32, 10)
    assert torch.equal(embedding[:23], tensors_of(original)["model.embed_tokens.weight"])
    assert embedding[23:].eq(0).all()


def test_type_is_changed_on_demand_and_config_says_so(original, tmp_path):
    folder = hf_to_megatron(original, tmp_path / "megatron", dtype=torch.bfloat16, progress=False)
    assert {tensor.dtype for tensor in open_distributed(folder).values()} == {torch.bfloat16}
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"


def test_fused_tensors_of_two_types_take_the_wider(original, tmp_path):
    tensors = tensors_of(original)
    tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"].bfloat16()
    save_file(tensors, original / "model.safetensors")
    stored = open_distributed(hf_to_megatron(original, tmp_path / "megatron", progress=False))
    assert stored["decoder.layers.0.mlp.linear_fc1.weight"].dtype == torch.float32


def test_what_fails_is_named_and_leaves_nothing_behind(original, tmp_path):
    with pytest.raises(ConfigurationError, match="--make-vocab-size-divisible-by 0"):
        hf_to_megatron(original, tmp_path / "megatron", make_vocab_size_divisible_by=0, progress=False)
    tensors, lost = tensors_of(original), "model.layers.3.mlp.up_proj.weight"
    save_file({name: tensor for name, tensor in tensors.items() if name != lost}, original / "model.safetensors")
    with pytest.raises(ConfigurationError, match="1 missing: model.layers.3.mlp.up_proj.weight"):
        hf_to_megatron(original, tmp_path / "megatron", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["odd"]


def test_folders_that_cannot_be_input_are_named(original, tmp_path):
    converted = hf_to_megatron(original, tmp_path / "megatron", progress=False)
    for folder, told in ((converted, "already in Megatron's format"), (tmp_path, "not a folder with a config.json")):
        with pytest.raises(ConfigurationError, match=f"--input {folder} is {told}"):
            hf_to_megatron(folder, tmp_path / "new", progress=False)
