"""Slices come from the right file and are counted; a broken file is named before anything is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from megatron_peft.config import ConfigurationError
from megatron_peft.conversion import source as source_module
from megatron_peft.conversion.source import listed, open_source

DOWN = "model.layers.1.mlp.down_proj.weight"
Copy = Callable[[str], Path]


@pytest.mark.parametrize("kind", ["single", "sharded", "torch"])
def test_slices_equal_those_of_the_model(
    kind: str, saved_folders: dict[str, Path], odd_llama: LlamaForCausalLM
) -> None:
    source = open_source(saved_folders[kind])
    state = odd_llama.state_dict()
    assert {name: header.shape for name, header in source.headers.items()} == {n: t.shape for n, t in state.items()}
    for name, tensor in state.items():
        assert torch.equal(source.slice(name, (slice(1, 5),)), tensor[1:5])
    assert torch.equal(source.slice(DOWN, (slice(None), slice(8, 16))), state[DOWN][:, 8:16])


def test_bytes_read_are_those_of_the_slices(saved_folders: dict[str, Path]) -> None:
    source = open_source(saved_folders["single"])
    assert source.bytes_read == 0
    source.slice(DOWN, (slice(None), slice(8, 16)))
    assert source.bytes_read == 96 * 8 * 4


@pytest.mark.parametrize("kind", ["single", "torch"])
def test_file_is_mapped_anew_so_that_touched_pages_go(
    kind: str, saved_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source_module, "MAPPED_BYTES", 30_000)  # a down_proj is 27,648 bytes
    source = open_source(saved_folders[kind])
    opened = []
    original = source_module._open_file
    monkeypatch.setattr(source_module, "_open_file", lambda path: opened.append(path) or original(path))
    for _ in range(6):
        source.slice(DOWN, (slice(0, 1),))
    assert len(opened) == 3


def test_safetensors_win_over_pickles(copy_of: Copy) -> None:
    folder = copy_of("single")
    (folder / "pytorch_model.bin").write_bytes(b"never opened")
    assert {h.file.name for h in open_source(folder).headers.values()} == {"model.safetensors"}


def test_sharded_pickles_are_read(copy_of: Copy, odd_llama: LlamaForCausalLM) -> None:
    folder = copy_of("torch")
    (folder / "pytorch_model.bin").unlink()
    state = odd_llama.state_dict()
    shards = {"pytorch_model-00001-of-00002.bin": {DOWN: state[DOWN]}}
    shards["pytorch_model-00002-of-00002.bin"] = {n: t for n, t in state.items() if n != DOWN}
    for file, tensors in shards.items():
        torch.save(tensors, folder / file)
    weight_map = {name: file for file, tensors in shards.items() for name in tensors}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    source = open_source(folder)
    for name in (DOWN, "model.norm.weight", DOWN):
        assert torch.equal(source.slice(name, (slice(None),)), state[name])


def test_folder_without_weights(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="holds no weights: expected one of model.safetensors"):
        open_source(tmp_path)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (lambda whole: whole[:-100], "truncated or torn"),
        (lambda whole: whole[:200], "truncated or torn, 200 bytes"),
        (lambda whole: b"", "truncated or torn, 0 bytes"),
        (lambda whole: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
    ],
)
@pytest.mark.parametrize(
    ("kind", "file"),
    [
        ("single", "model.safetensors"),
        ("sharded", "model-00004-of-00009.safetensors"),
        ("torch", "pytorch_model.bin"),
    ],
)
def test_torn_file_is_named(kind: str, file: str, content: Callable[[bytes], bytes], told: str, copy_of: Copy) -> None:
    path = copy_of(kind) / file
    path.write_bytes(content(path.read_bytes()))
    with pytest.raises(ConfigurationError, match=f"{file} cannot be read: .*{told}"):
        open_source(path.parent)


def test_missing_shard_is_named(copy_of: Copy) -> None:
    folder = copy_of("sharded")
    (folder / "model-00004-of-00009.safetensors").unlink()
    with pytest.raises(ConfigurationError, match="model-00004-of-00009.safetensors is missing, but the index"):
        open_source(folder)


@pytest.mark.parametrize("text", ['{"weight_map": {"model.norm', "{}", "[]", '{"weight_map": 3}'])
def test_torn_index_is_named(text: str, copy_of: Copy) -> None:
    folder = copy_of("sharded")
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ConfigurationError, match="model.safetensors.index.json is no index of weights"):
        open_source(folder)


def test_tensor_that_the_index_promises_in_vain_is_named(copy_of: Copy) -> None:
    index = copy_of("sharded") / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.ghost.weight"] = "model-00001-of-00009.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(ConfigurationError, match="not there: model.ghost.weight in model-00001-of-00009.safetensors"):
        open_source(index.parent)


def test_file_of_another_format_is_named(copy_of: Copy) -> None:
    index = copy_of("sharded") / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "config.json"}}))
    with pytest.raises(ConfigurationError, match="config.json is neither .safetensors nor .bin"):
        open_source(index.parent)


def test_pickle_with_code_is_refused(copy_of: Copy) -> None:
    path = copy_of("torch") / "pytorch_model.bin"
    torch.save({"a": Fraction(1, 2)}, path)  # a class of which neither torch nor megatron-core knows that it is safe
    with pytest.raises(ConfigurationError, match="holds more than tensors"):
        open_source(path.parent)


def test_old_torch_format_says_what_to_do(copy_of: Copy) -> None:
    path = copy_of("torch") / "pytorch_model.bin"
    torch.save({"a": torch.zeros(3)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(ConfigurationError, match="torch before 1.6.*Convert it to safetensors"):
        open_source(path.parent)


def test_long_lists_are_cut() -> None:
    assert listed("abc") == "a, b, c"
    assert listed("abcdefghijk") == "a, b, c, d, e, f, g, h and 3 more"
