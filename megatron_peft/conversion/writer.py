"""Sharded safetensors tensor by tensor, large files past the page cache, folders that appear whole."""

import errno
import fcntl
import json
import mmap
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from torch import Tensor

from megatron_peft.checkpoint.folders import sync
from megatron_peft.config import ConfigurationError, require
from megatron_peft.conversion.hf_files import SAFETENSORS_TYPES

# A large file written from start to end past the system's page cache.
#
# What a conversion writes is not read again soon: in the cache it would push out what is, cost a copy of every page,
# and be written out by the fsync at the end. Here a block that is full goes to the disk from the process's own
# memory, so that nothing is left for the fsync. Where the file system or the system knows no direct access, and for
# the last bytes of a file, which are no whole page, writing is the common kind.

BLOCK_BYTES = 4 * 2**20
_DIRECT: int = getattr(os, "O_DIRECT", 0)  # macOS has none


class DirectFile:
    """A new file to write to, with as much of a binary file as torch.save asks for. Close it: nothing else does.

    Errors are the OSErrors of `open` and `write`; a disk that is full may be told of as late as in `close`.
    """

    def __init__(self, path: Path) -> None:
        self._descriptor = _open(path)
        self._block = mmap.mmap(-1, BLOCK_BYTES)  # starts at a page, as direct access wants it
        self._filled = self._written = 0
        self._closed = False

    def write(self, data: bytes | memoryview) -> int:
        """All of `data`."""
        left = memoryview(data).cast("B")
        total = len(left)
        while left:
            piece, left = left[: BLOCK_BYTES - self._filled], left[BLOCK_BYTES - self._filled :]
            end = self._filled + len(piece)
            self._block[self._filled : end] = piece
            self._filled = end
            if end == BLOCK_BYTES:
                self._put(memoryview(self._block))
                self._filled = 0
        return total

    def tell(self) -> int:
        """Bytes so far."""
        return self._written + self._filled

    def flush(self) -> None:
        """Nothing: half a block stays here until `close`."""

    def close(self) -> None:
        """Write what is left of a block. A second call does nothing."""
        if self._closed:
            return
        self._closed = True
        try:
            if self._filled:
                _clear_direct(self._descriptor)
                self._put(memoryview(self._block)[: self._filled])
                self._filled = 0
        finally:
            os.close(self._descriptor)

    def __enter__(self) -> "DirectFile":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self.close()

    def _put(self, data: memoryview) -> None:
        while data:
            try:
                count = os.write(self._descriptor, data)
            except OSError as error:
                if error.errno != errno.EINVAL or not _clear_direct(self._descriptor):
                    raise
                continue  # this file system opens for direct access, and then refuses it
            if count % mmap.PAGESIZE:  # the disk is full, or nearly: the rest starts within a page
                _clear_direct(self._descriptor)
            self._written += count
            data = data[count:]


def _open(path: Path) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0)
    try:
        return os.open(path, flags | _DIRECT, 0o666)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        path.unlink(missing_ok=True)  # Linux makes the file before it refuses
        return os.open(path, flags, 0o666)


def _clear_direct(descriptor: int) -> bool:
    """From here on writing is the common kind. Returns whether it was not."""
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    fcntl.fcntl(descriptor, fcntl.F_SETFL, flags & ~_DIRECT)
    return bool(flags & _DIRECT)


# Sharded safetensors, written tensor by tensor.
#
# Names, shapes and types are known before any number is, so a file begins with its header and the tensors follow in
# their order. At no time is more than one tensor held.

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


def check_new(output: str | Path) -> None:
    """ConfigurationError if there is something at `output` already: nothing is ever overwritten."""
    require(not os.path.lexists(output), f"--output {output} exists already: remove it, or give another --output.")


@contextmanager
def new_folder(output: str | Path) -> Iterator[Path]:
    """A draft beside `output` to write into; it gets its name at the end, on the disk, and is removed on any error.

    Raises:
        ConfigurationError: `output` exists, its parent cannot be written, or the disk is full.
    """
    output = Path(output)
    check_new(output)
    draft: Path | None = None
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=".draft", dir=output.parent))
        draft.chmod(0o777 & ~_umask())
        yield draft
        for path in (*draft.iterdir(), draft):
            sync(path)
        check_new(output)
        draft.rename(output)
        sync(output.parent)
    except OSError as error:
        raise ConfigurationError(
            f"--output {output} could not be written ({error.strerror or error}): nothing is left of it. Make room "
            f"there, or give another --output."
        ) from error
    finally:
        if draft is not None:
            shutil.rmtree(draft, ignore_errors=True)  # gone already when all went well


def _umask() -> int:
    """Of this process; it can only be read by setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


@contextmanager
def byte_bar(description: str, total_bytes: int, enabled: bool) -> Iterator[Callable[[int], None]]:
    """Shows a bar while inside; what it yields is told of each number of bytes done."""
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    shown = enabled and console.is_terminal
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True, disable=not shown) as bar:
        task = bar.add_task(description, total=total_bytes)
        yield lambda num_bytes: bar.advance(task, num_bytes)
