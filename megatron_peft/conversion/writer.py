"""Sharded safetensors, written tensor by tensor.

Names, shapes and types are known before any number is, so a file begins with its header and the tensors follow in their
order. At no time is more than one tensor held.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from megatron_peft.config import ConfigurationError, require
from megatron_peft.conversion.direct_file import DirectFile
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


class SafetensorsWriter:
    """`<stem>.safetensors`, or several with an index, in `folder`. The files are whole when its block is left."""

    def __init__(
        self,
        folder: Path,
        specs: Mapping[str, TensorSpec],
        max_shard_bytes: int = DEFAULT_SHARD_BYTES,
        stem: str = "model",
    ) -> None:
        self._specs = specs
        self._coming = iter(specs)
        shards = list(_shards(specs, max_shard_bytes))
        files = [f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
        files = files if len(shards) > 1 else [f"{stem}.safetensors"]
        self._starts = {names[0]: (folder / file, names) for file, names in zip(files, shards, strict=True)}
        self._file: DirectFile | None = None
        if len(shards) > 1:
            weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
            _write_index(folder / f"{stem}{INDEX_SUFFIX}", weight_map, specs)

    @torch.no_grad()
    def write(self, name: str, tensor: Tensor) -> None:
        """Append a tensor in its announced type; they come in the order of `specs`."""
        spec, expected = self._specs[name], next(self._coming)
        assert name == expected, f"{name} is written where {expected} should be"
        assert tuple(tensor.shape) == spec.shape, (name, tensor.shape, spec.shape)
        if name in self._starts:
            self._close()
            self._file = self._begin(*self._starts[name])
        assert self._file is not None
        values = tensor.detach().to("cpu", spec.dtype).contiguous()
        self._file.write(values.reshape(-1).view(torch.uint8).numpy().data)

    def __enter__(self) -> "SafetensorsWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self._close()
        missing = list(self._coming)
        assert error is not None or not missing, f"never written: {missing[:8]}"

    def _begin(self, path: Path, names: list[str]) -> DirectFile:
        """A new file with its header."""
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in names:
            spec = self._specs[name]
            start, end = end, end + spec.num_bytes
            header[name] = {"dtype": TYPE_NAMES[spec.dtype], "shape": spec.shape, "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        file = DirectFile(path)
        file.write(len(text).to_bytes(8, "little") + text)
        return file

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _write_index(path: Path, weight_map: Mapping[str, str], specs: Mapping[str, TensorSpec]) -> None:
    total = sum(spec.num_bytes for spec in specs.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
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
