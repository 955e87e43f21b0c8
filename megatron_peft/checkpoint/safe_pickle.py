"""Unpickle checkpoints of other programs without running code from them.

`torch.load(weights_only=True)` reads a `torch.save` file; the classes of known libraries are replaced by `Inert`
stand-ins. The index of a distributed checkpoint (`.metadata`) is a plain pickle: only the classes that torch writes
into it are accepted, and they too are stand-ins, from whose attributes torch's own objects are built. Any other name
refuses the file.
"""

import logging
import pickle
import re
import struct
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import SavePlan
from torch.distributed.checkpoint.default_planner import _validate_global_plan
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_peft.config import ConfigurationError, require

INERT_NAMES = re.compile(
    r"argparse\.Namespace|signal\.Signals|_codecs\.encode|enum\.\w+|types\.SimpleNamespace"
    r"|numpy\.(core\.multiarray|_core\.multiarray|core\.numeric|_core\.numeric)\.\w+|numpy\.(ndarray|dtype|u?int\d+)"
    r"|numpy\.dtypes\.\w+|numpy\.random\.\w+"
    r"|(megatron|transformer_engine)(\.\w+)+"
)
INDEX_NAMES = re.compile(
    r"torch\.distributed\.checkpoint\.metadata\.\w+|torch\.distributed\.checkpoint\.filesystem\.(_StorageInfo|_StoragePrefix)"
    r"|torch\.(Size|float64|float32|float16|bfloat16|u?int\d+|bool|strided|layout|dtype)"
    r"|torch\.serialization\._get_layout|collections\.OrderedDict|pathlib(\._local)?\.\w*Path"
    r"|builtins\.getattr"  # Python 3.11.0 to 3.11.3 pickle a member of an enumeration as getattr(enumeration, name)
    r"|megatron\.core\.dist_checkpointing\.strategies\.torch\.(MCoreMetadata|MCoreSavePlan)"  # of megatron-core 0.15
)

# Exceptions that reading a damaged archive, or the pickle in it, may raise.
DAMAGE_ERRORS = (
    *(ArithmeticError, AttributeError, EOFError, LookupError, RuntimeError, TypeError, ValueError),
    *(pickle.UnpicklingError, struct.error, zipfile.BadZipFile),
)


class Inert:
    """Replace a class or function of a pickle: accept any arguments, do nothing, and keep the state as attributes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state if isinstance(state, dict) else {"state": state})


def load_inertly(path: Path) -> Any:
    """Load a torch.save file, with memory-mapped tensors and with objects of known libraries as `Inert`.

    Raises ConfigurationError: it names anything else, or it is truncated. No code from the file was run.
    """
    declared = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()  # megatron-core adds to torch's list of safe classes when it is imported
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
        _refuse(path, [name for name in names if not INERT_NAMES.fullmatch(name)])
        # One class for each name: torch's unpickler looks classes up by value.
        stand_ins: list[Any] = [(type("Inert_" + name.rpartition(".")[2], (Inert,), {}), name) for name in names]
        with torch.serialization.safe_globals(stand_ins):
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except ConfigurationError:
        raise
    except (*DAMAGE_ERRORS, OSError) as error:
        message = f"{path} cannot be read: it is truncated, or not a file of torch.save ({plain_reason(error)})."
        raise ConfigurationError(message) from error
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(declared)


def plain_reason(error: BaseException) -> str:
    """Return the first line of an error. torch's own, which advises to allow code in the file, is replaced."""
    named = re.search(r"GLOBAL ([\w.]+)", str(error))
    if "weights_only" in str(error):
        return f"it names {named[1]}" if named else "it holds more than tensors"
    return str(error).strip().partition("\n")[0]


def read_metadata(folder: Path) -> Metadata:
    """Read the index of a distributed checkpoint: its tensors, and where each slice is stored; no other objects.

    Raises ConfigurationError: it names a class that no index needs or a file outside `folder`, it is truncated, or
    slices of a tensor are missing. No code from the file was run.
    """
    path = folder / ".metadata"
    try:
        with path.open("rb") as file:
            stored = vars(_IndexUnpickler(file, path).load())
        tensors = {key: _tensor(entry) for key, entry in stored["state_dict_metadata"].items() if _is_tensor(entry)}
        places = dict(_place(path, *item) for item in stored["storage_data"].items() if item[0].fqn in tensors)
        index = Metadata(dict(tensors), storage_data=places)
        require_whole(path, index)
        return index
    except ConfigurationError:
        raise
    except Exception as error:  # noqa: BLE001 - a damaged pickle raises anything
        raise ConfigurationError(
            f"{path} cannot be read: {type(error).__name__}: {error}. Copy the checkpoint again."
        ) from error


class _IndexUnpickler(pickle.Unpickler):
    """Give each name in the pickle an empty class of its own.

    A pickle may set attributes on whatever it names; here it reaches only classes that nothing else uses.
    """

    def __init__(self, file: Any, path: Path) -> None:
        super().__init__(file)
        self._path = path
        self._stand_ins: dict[str, type[Inert]] = {}

    def find_class(self, module: str, name: str) -> Any:
        """Return the stand-in of a class that an index may name, or torch's own Size or dtype."""
        _refuse(self._path, [] if INDEX_NAMES.fullmatch(f"{module}.{name}") else [f"{module}.{name}"])
        if module == "torch" and (name == "Size" or isinstance(getattr(torch, name, None), torch.dtype)):
            return getattr(torch, name)
        return self._stand_ins.setdefault(name, type(name, (Inert,), {}))


def _is_tensor(entry: Any) -> bool:
    return type(entry).__name__ == TensorStorageMetadata.__name__


def _tensor(entry: Any) -> TensorStorageMetadata:
    dtype, *_ = entry.properties.state
    chunks = [ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes)) for chunk in entry.chunks]
    return TensorStorageMetadata(TensorProperties(dtype), torch.Size(entry.size), chunks)


def _place(path: Path, key: Any, place: Any) -> tuple[MetadataIndex, _StorageInfo]:
    file = place.relative_path
    require(
        file == Path(file).name and file != ".." and not getattr(place, "transform_descriptors", None),
        f"{path} is refused: it names {file!r}, which is not a file name in that directory.",
    )
    offset = None if key.offset is None else torch.Size(key.offset)
    return MetadataIndex(key.fqn, offset), _StorageInfo(file, int(place.offset), int(place.length))


def require_whole(path: Path, index: Metadata) -> None:
    """Raise ConfigurationError unless the slices of each tensor in an index fill it, once, and are stored."""
    # torch compares volumes only if there are several plans. Before torch 2.13 it returns a bool. It logs each problem.
    logging.getLogger(_validate_global_plan.__module__).setLevel(logging.ERROR)
    problems = _validate_global_plan([SavePlan([]), SavePlan([])], index)
    missing = [
        f"key:{key} has a slice at {tuple(chunk.offsets)} that is stored nowhere"
        for key, tensor in index.state_dict_metadata.items()
        for chunk in getattr(tensor, "chunks", ())
        if MetadataIndex(key, chunk.offsets) not in index.storage_data
    ]
    found = [*problems, *missing] if isinstance(problems, list) else missing
    require(
        problems in (True, []) and not missing,
        f"{path} is damaged: slices of a tensor are missing or overlap ({' '.join(found[:1])}). Copy the checkpoint "
        f"again.",
    )


def _refuse(path: Path, names: list[str]) -> None:
    require(
        not names,
        f"{path} is refused: to unpickle it would call {', '.join(sorted(names))}, which no checkpoint needs. "
        f"No code from it was run.",
    )
