"""The tensors of a Megatron distributed checkpoint (`torch_dist`), read box by box without a process group.

megatron-core's own reader needs one, unpickles the index without a check, and reads a layer of stacked keys only with
all the others.
"""

import io
import mmap
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from megatron_peft.checkpoint.safe_pickle import BoundedUnpickler, read_metadata
from megatron_peft.config import ConfigurationError, require
from megatron_peft.conversion.hf_files import listed


@dataclass(frozen=True)
class StoredBox:
    """A box of a global tensor (corner and sides in elements) and how to read it; `load` may give a lazy view."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]
    load: Callable[[], Tensor]


@dataclass(frozen=True)
class StoredTensor:
    """A global tensor of a checkpoint."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    boxes: tuple[StoredBox, ...]

    @property
    def is_whole(self) -> bool:
        """Whether the boxes, which never overlap, fill the tensor."""
        return sum(prod(box.shape) for box in self.boxes) == prod(self.shape)

    @torch.no_grad()
    def fill(self, target: Tensor, offset: Sequence[int]) -> int:
        """Copy the box at `offset`, as large as `target`, into it; what lies outside the tensor stays as it is.

        Returns:
            Bytes read, in the stored type.
        """
        return sum(_copy_overlap(target, offset, box) for box in self.boxes)


def _copy_overlap(target: Tensor, offset: Sequence[int], box: StoredBox) -> int:
    sides = list(zip(offset, target.shape, box.offset, box.shape, strict=True))
    overlaps = [(max(a, c), min(a + b, c + d)) for a, b, c, d in sides]
    if any(start >= stop for start, stop in overlaps):
        return 0
    inside_target = tuple(slice(start - a, stop - a) for (start, stop), (a, *_) in zip(overlaps, sides, strict=True))
    inside_box = tuple(slice(start - c, stop - c) for (start, stop), (*_, c, _) in zip(overlaps, sides, strict=True))
    stored = box.load()[inside_box]
    target[inside_target].copy_(stored)
    return stored.numel() * stored.element_size()


def layer_of(stack: StoredTensor, layer: int) -> StoredTensor:
    """One layer of tensors that are stored as one, with the layers along the first dimension."""
    boxes = (box for box in stack.boxes if box.offset[0] <= layer < box.offset[0] + box.shape[0])
    return StoredTensor(stack.shape[1:], stack.dtype, tuple(_layer_of_box(box, layer) for box in boxes))


def _layer_of_box(box: StoredBox, layer: int) -> StoredBox:
    return StoredBox(box.offset[1:], box.shape[1:], lambda: box.load()[layer - box.offset[0]])


def union(boxes: Iterable[StoredBox]) -> tuple[StoredBox, ...]:
    """The boxes without those that repeat an earlier one's place: copies on several ranks."""
    return tuple({box.offset: box for box in reversed(list(boxes))}.values())


# A tensor that torch.save has put somewhere into a larger file, as a view of the mapped file.
#
# `torch.load` would copy the numbers into memory of their own and unpickle in Python, which for a part of a MiB takes
# as long as copying it. What it reads: a zip archive without compression, where `data.pkl` describes the tensor and
# names the record with its numbers.

_LOCAL_HEADER_BYTES, _NAME_AND_EXTRA = 30, 26  # of a zip record: its fixed part, and where two lengths lie in it


def map_tensor(path: Path, start: int, length: int) -> Tensor:
    """The tensor whose archive lies at these bytes. The file stays mapped while the tensor is there.

    Raises:
        ValueError, pickle.UnpicklingError, zipfile.BadZipFile and the like: torn, or no single tensor.
    """
    before = start % mmap.ALLOCATIONGRANULARITY
    with open(path, "rb") as file:
        # A private copy where something is written: torch takes no buffer that cannot be.
        mapped = mmap.mmap(file.fileno(), before + length, access=mmap.ACCESS_COPY, offset=start - before)
    records = dict(_records(mapped))
    place, size = records["data.pkl"]
    storage, offset, shape, strides = _Description(io.BytesIO(mapped[place : place + size])).load()[:4]
    _, dtype, key, *_ = storage
    place, size = records[f"data/{key}"]
    numbers = torch.frombuffer(mapped, dtype=torch.uint8, count=size, offset=place)
    if numbers.data_ptr() % dtype.itemsize:
        numbers = numbers.clone()
    return numbers.view(dtype).as_strided(shape, strides, offset)


def _records(archive: mmap.mmap) -> Iterator[tuple[str, tuple[int, int]]]:
    """Name below the archive's folder, first byte and size of every record."""
    with zipfile.ZipFile(cast(IO[bytes], archive)) as directory:
        for record in directory.infolist():
            if record.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{record.filename} is compressed")
            lengths = struct.unpack_from("<HH", archive, record.header_offset + _NAME_AND_EXTRA)
            start = record.header_offset + _LOCAL_HEADER_BYTES + sum(lengths)
            yield record.filename.partition("/")[2], (start, record.file_size)


class _Description(BoundedUnpickler):
    """Loads (storage, offset, shape, strides, ...) of a tensor; storage is (kind, dtype, key, device, length)."""

    def persistent_load(self, pid: Any) -> Any:
        return pid

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda *described: described
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        # `dtype` of these classes warns that they will go, on stderr in the middle of a conversion.
        dtype = getattr(getattr(torch, name, None), "_dtype", None) if module == "torch" else None
        if not name.endswith("Storage") or not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no plain tensor needs")
        return dtype


# What reading a torn archive may raise; some of the bytes are a pickle, and a torn one raises anything.
_TORN = (
    *(ArithmeticError, AttributeError, EOFError, LookupError, RuntimeError, TypeError, ValueError),
    *(pickle.UnpicklingError, struct.error, zipfile.BadZipFile),
)


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


def _loader(path: Path, start: int, length: int, key: str, shape: tuple[int, ...]) -> Callable[[], Tensor]:
    def load() -> Tensor:
        try:
            tensor = map_tensor(path, start, length)
        except _TORN as error:
            raise ConfigurationError(f"{path} is damaged where it holds {key}: {error}".partition("\n")[0]) from error
        require(
            tuple(tensor.shape) == shape,
            f"{path} is damaged: it does not hold {key} {list(shape)} where its index says so.",
        )
        return tensor

    return load
