"""The tensors of a Megatron distributed checkpoint (`torch_dist`), read box by box without a process group.

megatron-core's own reader needs one, unpickles the index without a check, and reads a layer of stacked keys only with
all the others.
"""

import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from megatron_peft.checkpoint.safe_pickle import read_metadata
from megatron_peft.config import ConfigurationError, require
from megatron_peft.conversion.hf_files import listed
from megatron_peft.conversion.saved_tensor import map_tensor
from megatron_peft.conversion.stored_boxes import StoredBox, StoredTensor

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
