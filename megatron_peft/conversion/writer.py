"""Sharded safetensors, written tensor by tensor.

Names, shapes and types are known before any number is, so the headers of all files are laid out first and each tensor
is then written to its place, in any order. At no time is more than one tensor held.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from megatron_peft.config import ConfigurationError, require
from megatron_peft.conversion.stored_types import SAFETENSORS_TYPES

DEFAULT_SHARD_BYTES = 5 * 10**9
INDEX_SUFFIX = ".safetensors.index.json"
TYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_TYPES.items()}
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_ALIGNMENT = 8  # bytes; the header is padded with spaces so that numbers start aligned


@dataclass(frozen=True)
class TensorSpec:
    """What will be written under a name."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class _Place:
    path: Path
    start: int


class SafetensorsWriter:
    """`<stem>.safetensors`, or several with an index, in `folder`. Call `finish` when all is written."""

    def __init__(
        self,
        folder: Path,
        specs: Mapping[str, TensorSpec],
        max_shard_bytes: int = DEFAULT_SHARD_BYTES,
        stem: str = "model",
    ) -> None:
        self._specs = specs
        self._missing = set(specs)
        self._places: dict[str, _Place] = {}
        shards = list(_shards(specs, max_shard_bytes))
        for number, names in enumerate(shards, 1):
            single = len(shards) == 1
            file = f"{stem}.safetensors" if single else f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
            self._lay_out(folder / file, names)
        if len(shards) > 1:
            self._write_index(folder / f"{stem}{INDEX_SUFFIX}")

    @torch.no_grad()
    def write(self, name: str, tensor: Tensor) -> None:
        """Put a tensor, in its announced type, into its place."""
        spec, place = self._specs[name], self._places[name]
        assert tuple(tensor.shape) == spec.shape, (name, tensor.shape, spec.shape)
        values = tensor.detach().to("cpu", spec.dtype).contiguous()
        with open(place.path, "r+b") as file:
            file.seek(place.start)
            file.write(values.reshape(-1).view(torch.uint8).numpy().data)
        self._missing.discard(name)

    def finish(self) -> None:
        """Check that nothing was forgotten."""
        assert not self._missing, f"never written: {sorted(self._missing)[:8]}"

    def _lay_out(self, path: Path, names: list[str]) -> None:
        """An empty file with its header, as long as it will be in the end."""
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in names:
            start, end = end, end + self._specs[name].num_bytes
            spec = self._specs[name]
            header[name] = {"dtype": TYPE_NAMES[spec.dtype], "shape": spec.shape, "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        with open(path, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            first = file.tell()
            file.truncate(first + end)
        start = first
        for name in names:
            self._places[name] = _Place(path, start)
            start += self._specs[name].num_bytes

    def _write_index(self, path: Path) -> None:
        total = sum(spec.num_bytes for spec in self._specs.values())
        weight_map = {name: self._places[name].path.name for name in sorted(self._places)}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        path.write_text(json.dumps(index, indent=2) + "\n")


def parse_bytes(text: str) -> int:
    """`5GB`, `200MB`, `1GiB` or plain bytes, as a number of bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?B|)", text.strip().upper())
    if match is None or float(match[1]) <= 0:
        raise ConfigurationError(f"--max-shard-size {text!r} is no size: give one like 5GB, 500MB or 1GiB.")
    return int(float(match[1]) * UNITS[match[2]])


def _shards(specs: Mapping[str, TensorSpec], max_shard_bytes: int) -> Iterator[list[str]]:
    """Names of each file, in their order; a tensor above the limit has a file of its own."""
    require(max_shard_bytes > 0, f"--max-shard-size {max_shard_bytes} must be above 0.")
    names: list[str] = []
    filled = 0
    for name, spec in specs.items():
        if names and filled + spec.num_bytes > max_shard_bytes:
            yield names
            names, filled = [], 0
        names.append(name)
        filled += spec.num_bytes
    yield names
