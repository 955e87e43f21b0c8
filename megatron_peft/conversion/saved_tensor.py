"""A tensor that torch.save has put somewhere into a larger file, as a view of the mapped file.

`torch.load` would copy the numbers into memory of their own and unpickle in Python, which for a part of a MiB takes as
long as copying it. What it reads: a zip archive without compression, where `data.pkl` describes the tensor and names
the record with its numbers.
"""

import io
import mmap
import pickle
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor

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


class _Description(pickle.Unpickler):
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
