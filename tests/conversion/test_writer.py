"""Safetensors that are written in pieces are what the safetensors library would have written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from megatron_peft.config import ConfigurationError
from megatron_peft.conversion.writer import SafetensorsWriter, TensorSpec, parse_bytes

TENSORS = {
    "a": torch.randn(3, 5),
    "b": torch.randn(7).bfloat16(),
    "c": torch.randn(2, 2, 2).half(),
    "d": torch.randn(4, 4).double().t(),
    "scalar": torch.tensor(1.5),
}
SPECS = {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in TENSORS.items()}


def write(folder: Path, **settings) -> dict[str, list[str]]:
    """Names in each file."""
    with SafetensorsWriter(folder, SPECS, **settings) as writer:
        for name, tensor in TENSORS.items():
            writer.write(name, tensor)
    found = {path.name: load_file(path) for path in sorted(folder.glob("*.safetensors"))}
    for tensors in found.values():
        assert all(t.dtype == TENSORS[n].dtype and torch.equal(t, TENSORS[n]) for n, t in tensors.items())
    return {file: sorted(tensors) for file, tensors in found.items()}


def test_one_file_holds_everything(tmp_path: Path) -> None:
    assert write(tmp_path) == {"model.safetensors": sorted(TENSORS)}
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert len(list(tmp_path.iterdir())) == 1


def test_shards_keep_the_limit_and_have_an_index(tmp_path: Path) -> None:
    files = write(tmp_path, max_shard_bytes=80)
    assert files == {
        "model-00001-of-00004.safetensors": ["a", "b"],
        "model-00002-of-00004.safetensors": ["c"],
        "model-00003-of-00004.safetensors": ["d"],  # above the limit by itself
        "model-00004-of-00004.safetensors": ["scalar"],
    }
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: file for file, names in files.items() for name in names}
    assert index["metadata"]["total_size"] == sum(spec.num_bytes for spec in SPECS.values())


def test_another_stem(tmp_path: Path) -> None:
    assert list(write(tmp_path, stem="adapter_model")) == ["adapter_model.safetensors"]


def test_a_forgotten_tensor_is_noticed(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="never written: .*scalar"), SafetensorsWriter(tmp_path, SPECS) as writer:
        writer.write("a", TENSORS["a"])


def test_a_tensor_out_of_order_is_noticed(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="b is written where a should be"):
        with SafetensorsWriter(tmp_path, SPECS) as writer:
            writer.write("b", TENSORS["b"])


def test_tensors_are_cast_to_their_announced_type(tmp_path: Path) -> None:
    with SafetensorsWriter(tmp_path, {"a": TensorSpec((3, 5), torch.bfloat16)}) as writer:
        writer.write("a", TENSORS["a"])
    assert torch.equal(load_file(tmp_path / "model.safetensors")["a"], TENSORS["a"].bfloat16())


@pytest.mark.parametrize(
    ("text", "num_bytes"), [("5GB", 5 * 10**9), ("1.5 GiB", 3 * 2**29), ("200mb", 2 * 10**8), ("4096", 4096)]
)
def test_sizes_are_understood(text: str, num_bytes: int) -> None:
    assert parse_bytes(text) == num_bytes


@pytest.mark.parametrize("text", ["", "5 bananas", "-1GB", "0MB"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(ConfigurationError, match="--max-shard-size .* is no size"):
        parse_bytes(text)
