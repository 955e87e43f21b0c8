"""Write large files past the page cache, and safetensors tensor by tensor."""

import errno
import fcntl
import io
import json
import mmap
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from torch import Tensor

from megatron_peft.config import require, untrusted
from megatron_peft.conversion.hf_files import SAFETENSORS_TYPES

BLOCK_BYTES = 4 * 2**20
_DIRECT: int = getattr(os, "O_DIRECT", 0)  # macOS has none


# In place of `open(path, "xb")`: copying to the page cache and syncing it takes half again the CPU time of a conversion
# to safetensors, more than the benchmark `convert` allows, and pushes other files out of the cache. Dropping the pages
# with posix_fadvise after every fsync is no faster.
class DirectFile(io.FileIO):
    """A new file, written in order and in blocks past the page cache, where the file system supports O_DIRECT.

    Raises OSError as `open` and `write` do; an error of the disk may show only in `close`.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, "xb")
        self._block = mmap.mmap(-1, BLOCK_BYTES)  # O_DIRECT needs memory aligned to pages
        self._is_direct = False
        with suppress(OSError):  # the file system does not support it
            self._set_direct(True)

    def write(self, data: Any) -> int:
        """Write all of `data`, which is bytes-like."""
        rest = memoryview(data).cast("B")
        num_bytes = len(rest)
        while rest:
            taken = self._block.write(rest[: len(self._block) - self._block.tell()])
            rest = rest[taken:]
            if self._block.tell() == len(self._block):
                self._write_block()
        return num_bytes

    def tell(self) -> int:
        """Bytes so far."""
        return super().tell() + self._block.tell()

    def close(self) -> None:
        """Write the rest of the last block. A second call does nothing."""
        if self.closed:
            return
        try:
            if self._block.tell():
                self._set_direct(False)  # the rest does not fill its last page
                self._write_block()
        finally:
            super().close()

    def _write_block(self) -> None:
        data = memoryview(self._block)[: self._block.tell()]
        while data:
            try:
                data = data[os.write(self.fileno(), data) :]
            except OSError as error:
                # Some file systems refuse O_DIRECT only here; on a disk that is almost full, the rest starts in a page.
                if error.errno != errno.EINVAL or not self._is_direct:
                    raise
                self._set_direct(False)
        self._block.seek(0)

    def _set_direct(self, is_direct: bool) -> None:
        flags = fcntl.fcntl(self.fileno(), fcntl.F_GETFL) & ~_DIRECT
        fcntl.fcntl(self.fileno(), fcntl.F_SETFL, flags | (_DIRECT if is_direct else 0))
        self._is_direct = is_direct


DEFAULT_SHARD_BYTES = 5 * 10**9
INDEX_SUFFIX = ".safetensors.index.json"
TYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_TYPES.items()}
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def require_no_overflow(values: Tensor, name: str) -> None:
    """ConfigurationError: what is to be written holds NaN or infinities, although what was read did not."""
    require(
        untrusted.is_finite(values),
        f"{name} would hold NaN or infinities in {str(values.dtype).removeprefix('torch.')}: give a wider --dtype, or "
        f"an older iter_* folder of a run that has diverged.",
    )


@torch.no_grad()
def write_safetensors(
    folder: Path,
    specs: Mapping[str, Tensor],
    tensors: Iterable[tuple[str, Tensor]],
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    stem: str = "model",
    advance: Callable[[int], None] = lambda num_bytes: None,
) -> None:
    """Write `<stem>.safetensors`, or several shards with an index, into `folder`.

    specs: shape and type of every tensor, without data (on `meta`), by name: a file starts with its header.
    tensors: names and tensors in the order of `specs`. Each is cast to the type of its spec, written, and freed
        before the next is asked for.
    advance: called with the bytes of each tensor that has been written.

    Raises ConfigurationError: the limit is 0, or a value does not fit the type.
    """
    require(max_shard_bytes > 0, f"--max-shard-size {max_shard_bytes} must be above 0.")
    split = split_state_dict_into_shards_factory(
        dict(specs),
        get_storage_size=lambda spec: spec.nbytes,
        filename_pattern=stem + "{suffix}.safetensors",
        max_shard_size=max_shard_bytes,
    )
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": dict(sorted(split.tensor_to_filename.items()))}
        (folder / f"{stem}{INDEX_SUFFIX}").write_text(json.dumps(index, indent=2) + "\n")
    remaining = iter(specs)
    files: dict[str, DirectFile] = {}  # open ones: two at most, if one is of a tensor above the limit
    try:
        for name, tensor in tensors:
            spec, expected = specs[name], next(remaining)
            assert name == expected, f"{name} is written where {expected} should be"
            assert tensor.shape == spec.shape, (name, tensor.shape, spec.shape)
            file_name = split.tensor_to_filename[name]
            names = split.filename_to_tensors[file_name]
            if name == names[0]:
                files[file_name] = DirectFile(folder / file_name)
                files[file_name].write(_header({name: specs[name] for name in names}))
            values = tensor.detach().to("cpu", spec.dtype).contiguous()
            require_no_overflow(values, name)
            files[file_name].write(values.reshape(-1).view(torch.uint8).numpy().data)
            del tensor, values
            if name == names[-1]:
                files.pop(file_name).close()
            advance(spec.nbytes)
    finally:
        for file in files.values():
            file.close()
    missing = list(remaining)
    assert not missing, f"never written: {missing[:8]}"


def _header(specs: Mapping[str, Tensor]) -> bytes:
    """The first bytes of a safetensors file."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, spec in specs.items():
        start, end = end, end + spec.nbytes
        header[name] = {"dtype": TYPE_NAMES[spec.dtype], "shape": [*spec.shape], "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the data starts aligned
    return len(text).to_bytes(8, "little") + text


def parse_bytes(text: str) -> int:
    """Return the number of bytes in `5GB`, `200MB`, `1GiB` or a plain number.

    Raises ConfigurationError: `text` is not a size, or less than one byte.
    """
    # huggingface_hub's parse_size_to_int accepts neither GiB nor plain bytes.
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?B|)", text.strip().upper())
    num_bytes = 0 if match is None else int(float(match[1]) * UNITS[match[2]])
    require(num_bytes > 0, f"--max-shard-size {text!r} is not a size: use a form like 5GB, 500MB or 1GiB.")
    return num_bytes


@contextmanager
def byte_bar(description: str, total_bytes: int, enabled: bool) -> Iterator[Callable[[int], None]]:
    """Show a progress bar at a terminal; yields a function that advances it by a number of bytes."""
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    shown = enabled and console.is_terminal
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True, disable=not shown) as bar:
        task = bar.add_task(description, total=total_bytes)
        yield lambda num_bytes: bar.advance(task, num_bytes)
