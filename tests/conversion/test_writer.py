"""Sharded safetensors hold every tensor once, within the size limit."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from megatron_peft.config import ConfigurationError
from megatron_peft.conversion.writer import parse_bytes, write_safetensors

TENSORS = {
    "a": torch.randn(3, 5),
    "b": torch.randn(7).bfloat16(),
    "c": torch.randn(2, 2, 2).half(),
    "d": torch.randn(4, 4).double().t(),
    "scalar": torch.tensor(1.5),
}
SPECS = {name: torch.empty_like(tensor, device="meta") for name, tensor in TENSORS.items()}


def write(folder, **settings) -> dict[str, list[str]]:
    """Names in each file."""
    write_safetensors(folder, SPECS, TENSORS.items(), **settings)
    found = {path.name: load_file(path) for path in sorted(folder.glob("*.safetensors"))}
    for tensors in found.values():
        assert all(t.dtype == TENSORS[n].dtype and torch.equal(t, TENSORS[n]) for n, t in tensors.items())
    return {file: sorted(tensors) for file, tensors in found.items()}


@pytest.mark.parametrize("stem", ["model", "adapter_model"])
def test_one_file_holds_everything(stem, tmp_path):
    assert write(tmp_path, stem=stem) == {f"{stem}.safetensors": sorted(TENSORS)}
    with safe_open(tmp_path / f"{stem}.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert len(list(tmp_path.iterdir())) == 1


def test_shards_keep_the_limit_and_have_an_index(tmp_path):
    files = write(tmp_path, max_shard_bytes=80)
    names = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    assert files == dict(zip(names, (["a", "b"], ["d"], ["c", "scalar"]), strict=True))  # d alone is above the limit
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: file for file, names in files.items() for name in names}
    assert index["metadata"]["total_size"] == sum(spec.nbytes for spec in SPECS.values())


def test_sizes_are_understood():
    sizes = {"5GB": 5 * 10**9, "1.5 GiB": 3 * 2**29, "200mb": 2 * 10**8, "4096": 4096}
    assert {text: parse_bytes(text) for text in sizes} == sizes
    for text in ("", "5 bananas", "-1GB", "0MB", "0.5"):
        with pytest.raises(ConfigurationError, match="--max-shard-size .* is not a size"):
            parse_bytes(text)
