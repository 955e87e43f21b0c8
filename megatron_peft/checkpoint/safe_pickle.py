"""Pickles of other people's checkpoints, read so that nothing in them can run.

Two kinds are met. A `torch.save` file with Megatron-LM's arguments, counters and generators beside the weights is
read with `weights_only=True`; what it names of the libraries that wrote it is replaced by `Inert`, which does nothing
whatever it is called with. The index of a distributed checkpoint (`.metadata`) is a plain pickle of a few classes of
torch, none of which it gets to see. A name outside the lists below refuses the file.
"""

import gc
import io
import pickle
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.distributed.checkpoint import metadata as torch_metadata
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_peft.config import ConfigurationError, require
from megatron_peft.config.untrusted import read_bytes

INERT_NAMES = re.compile(
    r"argparse\.Namespace|signal\.Signals|_codecs\.encode|enum\.\w+|types\.SimpleNamespace"
    r"|numpy\.(core\.multiarray|_core\.multiarray|core\.numeric|_core\.numeric)\.\w+|numpy\.(ndarray|dtype|u?int\d+)"
    r"|numpy\.dtypes\.\w+|numpy\.random\.\w+"
    r"|(megatron|transformer_engine)(\.\w+)+"
)
METADATA_CLASSES = {*torch_metadata.__all__, "_MEM_FORMAT_ENCODING"}
METADATA_NAMES = re.compile(
    r"torch\.(Size|float64|float32|float16|bfloat16|u?int\d+|bool|strided|layout|dtype)"
    r"|torch\.serialization\._get_layout|torch\.distributed\.checkpoint\.filesystem\.(_StorageInfo|_StoragePrefix)"
    r"|pathlib\.(Posix|PurePosix|Windows|PureWindows)?Path|pathlib\._local\.\w*Path|collections\.OrderedDict"
    r"|megatron\.core\.dist_checkpointing\.strategies\.torch\.(MCoreMetadata|MCoreSavePlan)"  # of its 0.15
)

_MOST_PARTS = 1000  # of a key that is a tuple
_OPCODES = pickle._Unpickler.dispatch  # pyright: ignore[reportAttributeAccessIssue]
_REFUSED_OPCODES = (pickle.ADDITEMS, pickle.FROZENSET, pickle.BYTEARRAY8, pickle.EXT1, pickle.EXT2, pickle.EXT4)

Kind = TypeVar("Kind")


class Inert:
    """Stands in for a class or function of a pickle: takes anything, does nothing. State becomes attributes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.arguments = args

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)


def load_inertly(path: Path) -> Any:
    """The content of a torch.save file, tensors memory-mapped, objects of known libraries as `Inert`.

    Raises:
        ConfigurationError: it names anything else (and nothing of it has run), or it is torn.
    """
    try:
        require_harmless(path)
        with _nothing_called_safe():
            names = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
            _refuse(path, [name for name in names if not INERT_NAMES.fullmatch(name)])
            stand_ins: list[Any] = [(_stand_in(name), name) for name in names]
            with torch.serialization.safe_globals(stand_ins):
                return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (RuntimeError, OSError, EOFError, ValueError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        if isinstance(error, ConfigurationError):
            raise
        reason = plain_reason(error)
        raise ConfigurationError(f"{path} cannot be read: it is torn, or no file of torch.save ({reason}).") from error


def require_harmless(path: Path) -> None:
    """Go through the pickle of a torch.save file as torch would, but for its tensors, which takes milliseconds.

    Raises:
        pickle.UnpicklingError, RuntimeError and the like: torch would crash on it, or it is torn.
    """
    with torch.serialization._open_zipfile_reader(str(path)) as archive:
        if archive.has_record("data.pkl"):
            _Rehearsal(io.BytesIO(archive.get_record("data.pkl"))).load()


def plain_reason(error: BaseException) -> str:
    """The first line of an error, but for torch's own, which advises to let the file run code."""
    named = re.search(r"GLOBAL ([\w.]+)", str(error))
    if "weights_only" in str(error):
        return f"it names {named[1]}" if named else "it holds more than tensors"
    return str(error).strip().partition("\n")[0]


def read_metadata(folder: Path) -> Metadata:
    """The index of a distributed checkpoint: its tensors, and where each part of them lies.

    What it says of anything but tensors is left out, so that no reader can be sent to unpickle it.

    Raises:
        ConfigurationError: it names a class that no index needs, or a file outside `folder`, or it is torn. Nothing in
            it has run.
    """
    path = folder / ".metadata"
    unpickler = _IndexUnpickler(path)
    try:
        return unpickler.index()
    except ConfigurationError:
        raise
    except Exception as error:  # noqa: BLE001 - a torn pickle raises anything
        raise ConfigurationError(
            f"{path} cannot be read: {type(error).__name__}: {error}. Copy the checkpoint again."
        ) from error


class _Plain:
    """An object of an index as it was pickled: no class of torch's is within reach of the pickle."""

    arguments: tuple[Any, ...] = ()
    state: Any = None

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        self.state = state


class BoundedUnpickler(pickle._Unpickler):  # pyright: ignore[reportAttributeAccessIssue]
    """Python's unpickler in Python, which no pickle can crash.

    The one in C overflows the stack where a tuple that is nested a million deep becomes a key, and makes a table as
    large as the largest memo index.
    """

    def load_dict(self) -> None:
        items = self.pop_mark()
        _require_small(items[::2])
        self.append({items[i]: items[i + 1] for i in range(0, len(items), 2)})

    def load_setitem(self) -> None:
        _require_small(self.stack[-2:-1])
        super().load_setitem()

    def load_setitems(self) -> None:
        _require_small(self.stack[::2])
        super().load_setitems()

    dispatch = {  # pyright: ignore[reportAssignmentType]
        **{code: load for code, load in _OPCODES.items() if bytes([code]) not in _REFUSED_OPCODES},
        **{pickle.DICT[0]: load_dict, pickle.SETITEM[0]: load_setitem, pickle.SETITEMS[0]: load_setitems},
    }


def _require_small(keys: list[Any]) -> None:
    """A tuple among them is hashed part by part, however deep and however often it holds the same one."""
    for key in keys:
        parts = [key] if isinstance(key, tuple | list) else []
        for _ in range(_MOST_PARTS):
            if not parts:
                break
            one = parts.pop()
            parts += one if isinstance(one, tuple | list) else ()
        if parts:
            raise pickle.UnpicklingError(f"a key is a tuple of more than {_MOST_PARTS} parts")


class _Collection(dict):
    """In place of an OrderedDict (of pairs, maybe) or a set; a state dict has `_metadata`."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__()
        _require_small([item for items in arguments if isinstance(items, tuple | list) for item in items])

    def __setstate__(self, state: Any) -> None:
        pass


class _Rehearsal(BoundedUnpickler):
    """Nothing comes of what it reads."""

    def find_class(self, module: str, name: str) -> Any:
        return type(name, (_Plain if module not in ("collections", "builtins", "__builtin__") else _Collection,), {})

    def persistent_load(self, pid: Any) -> Any:
        return _Plain()


class _IndexUnpickler(BoundedUnpickler):
    """Gives each name of the pickle a class of its own, which does nothing, and makes torch's objects of what it finds.

    A pickle may set attributes on whatever it names: on torch's own classes it could leave a `__call__` behind, or let
    one object look like another. Here it only ever reaches classes that are gone with the file.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(io.BytesIO(read_bytes(path)))
        self._path = path
        self._classes: dict[str, type[_Plain]] = {}

    def find_class(self, module: str, name: str) -> Any:
        whole = f"{module}.{name}"
        known = module == torch_metadata.__name__ and name in METADATA_CLASSES
        if not known and not METADATA_NAMES.fullmatch(whole):
            _refuse(self._path, [whole])
        if isinstance(found := getattr(torch, name, None), torch.dtype) and module == "torch":
            return found
        return self._classes.setdefault(name, type(name, (_Plain,), {}))

    def index(self) -> Metadata:
        with _collector_paused():
            return self._index()

    def _index(self) -> Metadata:
        root = self.load()
        is_index = any(type(root) is self._classes.get(name) for name in ("Metadata", "MCoreMetadata"))
        require(is_index, f"{self._path} is no index of a distributed checkpoint.")
        fields = self._typed(root.state, dict)
        stored = self._typed(fields["state_dict_metadata"], dict)
        tensors = {
            self._typed(key, str): self._tensor(entry)
            for key, entry in stored.items()
            if type(entry) is not self._classes.get("BytesStorageMetadata")
        }
        places = dict(map(self._place, self._typed(fields["storage_data"], dict).items()))
        return Metadata(tensors, storage_data={key: place for key, place in places.items() if key.fqn in tensors})  # type: ignore[arg-type]

    def _tensor(self, entry: Any) -> TensorStorageMetadata:
        fields = self._state(entry, "TensorStorageMetadata")
        chunks = [self._state(chunk, "ChunkStorageMetadata") for chunk in self._typed(fields["chunks"], list)]
        properties = self._typed(fields["properties"], self._classes["TensorProperties"])
        dtype, *_ = self._typed(properties.state, tuple)
        return TensorStorageMetadata(
            TensorProperties(self._typed(dtype, torch.dtype)),
            self._size(fields["size"]),
            [ChunkStorageMetadata(self._size(chunk["offsets"]), self._size(chunk["sizes"])) for chunk in chunks],
        )

    def _place(self, item: tuple[Any, Any]) -> tuple[MetadataIndex, _StorageInfo]:
        key, place = self._state(item[0], "MetadataIndex"), self._state(item[1], "_StorageInfo")
        offset, file = key.get("offset"), self._typed(place["relative_path"], str)
        require(
            file == Path(file).name and file != ".." and not place.get("transform_descriptors"),
            f"{self._path} is refused: it names {file!r}, which is no plain file of that folder.",
        )
        index = MetadataIndex(self._typed(key["fqn"], str), None if offset is None else self._size(offset))
        return index, _StorageInfo(file, self._count(place["offset"]), self._count(place["length"]))

    def _state(self, value: Any, name: str) -> dict[str, Any]:
        return self._typed(self._typed(value, self._classes[name]).state, dict)

    def _size(self, value: Any) -> torch.Size:
        (numbers,) = self._typed(value, self._classes["Size"]).arguments
        return torch.Size(map(self._count, self._typed(numbers, tuple)))

    def _count(self, value: Any) -> int:
        require(0 <= self._typed(value, int) < 2**63, f"{self._path} is no index of a distributed checkpoint: {value}.")
        return value

    def _typed(self, value: Any, kind: type[Kind]) -> Kind:
        """`value`, if it is of this very class: a subclass could be anything."""
        require(
            type(value) is kind,
            f"{self._path} is no index of a distributed checkpoint: it holds {type(value).__name__} instead of "
            f"{kind.__name__}.",
        )
        return value


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Millions of objects that all stay: to look through them again and again takes longer than to make them."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@contextmanager
def _nothing_called_safe() -> Iterator[None]:
    """Forget for a while what other libraries have declared safe: megatron-core does when it is imported."""
    declared = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        yield
    finally:
        torch.serialization.add_safe_globals(declared)


def _refuse(path: Path, names: list[str]) -> None:
    require(
        not names,
        f"{path} is refused: to unpickle it would call {', '.join(sorted(names))}, which no checkpoint needs. "
        f"Nothing of it was run.",
    )


def _stand_in(name: str) -> type[Inert]:
    """A class of its own for each name: torch's unpickler looks classes up by value."""
    return type("Inert_" + name.rpartition(".")[2], (Inert,), {})
