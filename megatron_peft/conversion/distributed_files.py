"""The tensors of a Megatron distributed checkpoint (`torch_dist`), read box by box without a process group.

megatron-core's own reader needs one, unpickles the index without a check, and reads a layer of stacked keys only with
all the others.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from megatron_peft.config import ConfigurationError, require
from megatron_peft.conversion.safe_pickle import read_metadata
from megatron_peft.conversion.source import listed
from megatron_peft.conversion.stored_boxes import StoredBox, StoredTensor

INDEX = ".metadata"


def open_distributed(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor by key. Nothing but the index is read.

    Raises:
        ConfigurationError: the index is torn or refused, a file is missing or too short, or a tensor has holes.
    """
    index = read_metadata(folder)
    _check_files(folder, index.storage_data)
    stored = {
        key: _tensor(folder, key, entry, index.storage_data)
        for key, entry in index.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    torn = [key for key, tensor in stored.items() if not tensor.is_whole]
    require(not torn, f"{folder} is damaged: parts are missing of {listed(torn)}. Copy the checkpoint again.")
    return stored


def _check_files(folder: Path, storage: dict) -> None:
    """Every file is there and long enough for what the index puts into it."""
    ends: dict[str, int] = {}
    for place in storage.values():
        ends[place.relative_path] = max(ends.get(place.relative_path, 0), place.offset + place.length)
    missing = sorted(name for name in ends if not (folder / name).is_file())
    require(not missing, f"{folder} lacks {listed(missing)}, which its index lists: copy the checkpoint again.")
    short = sorted(name for name, end in ends.items() if (folder / name).stat().st_size < end)
    require(not short, f"{folder} is torn: {listed(short)} are shorter than written. Copy the checkpoint again.")


def _tensor(folder: Path, key: str, entry: TensorStorageMetadata, storage: dict) -> StoredTensor:
    boxes = []
    for chunk in entry.chunks:
        place = storage.get(MetadataIndex(key, chunk.offsets))
        if place is not None:
            load = _loader(folder / place.relative_path, place.offset, place.length, key, tuple(chunk.sizes))
            boxes.append(StoredBox(tuple(chunk.offsets), tuple(chunk.sizes), load))
    return StoredTensor(tuple(entry.size), entry.properties.dtype, tuple(boxes))


class _Window(io.RawIOBase):
    """A stretch of a file as a file of its own: torch reads numbers from it straight into their tensor."""

    def __init__(self, file: BinaryIO, start: int, length: int) -> None:
        self._file, self._start, self._length = file, start, length
        file.seek(start)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._file.tell() - self._start

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self.tell(), io.SEEK_END: self._length}[whence]
        return self._file.seek(self._start + origin + offset) - self._start

    def readinto(self, buffer: Any, /) -> int:
        left = max(self._length - self.tell(), 0)
        return self._file.readinto(memoryview(buffer)[:left])  # type: ignore[attr-defined]


def _loader(path: Path, start: int, length: int, key: str, shape: tuple[int, ...]) -> Callable[[], Tensor]:
    def load() -> Tensor:
        try:
            with open(path, "rb") as file:
                window = cast(IO[bytes], _Window(file, start, length))
                tensor = torch.load(window, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
            raise ConfigurationError(f"{path} is damaged where it holds {key}: {error}".partition("\n")[0]) from error
        require(
            isinstance(tensor, Tensor) and tuple(tensor.shape) == shape,
            f"{path} is damaged: it does not hold {key} {list(shape)} where its index says so.",
        )
        return tensor

    return load
