"""Unpickle other people's checkpoints without running anything in them.

torch.load with `weights_only=True` reads a `torch.save` file; the classes of known libraries become `Inert`. The index
of a distributed checkpoint (`.metadata`) is a plain pickle of a few torch classes, which are rebuilt from its values. A
name outside the lists below refuses the file.
"""

import gc
import io
import pickle
import re
import struct
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.distributed.checkpoint import metadata as torch_metadata
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata

from megatron_peft.config import ConfigurationError, require
from megatron_peft.config.untrusted import read_bytes

INERT_NAMES = re.compile(
    r"argparse\.Namespace|signal\.Signals|_codecs\.encode|enum\.\w+|types\.SimpleNamespace"
    r"|numpy\.(core\.multiarray|_core\.multiarray|core\.numeric|_core\.numeric)\.\w+|numpy\.(ndarray|dtype|u?int\d+)"
    r"|numpy\.dtypes\.\w+|numpy\.random\.\w+"
    r"|(megatron|transformer_engine)(\.\w+)+"
)
MEMORY_FORMAT = "_MEM_FORMAT_ENCODING"
METADATA_CLASSES = {*torch_metadata.__all__, MEMORY_FORMAT}
METADATA_NAMES = re.compile(
    r"torch\.(Size|float64|float32|float16|bfloat16|u?int\d+|bool|strided|layout|dtype)"
    r"|torch\.serialization\._get_layout|torch\.distributed\.checkpoint\.filesystem\.(_StorageInfo|_StoragePrefix)"
    r"|pathlib\.(Posix|PurePosix|Windows|PureWindows)?Path|pathlib\._local\.\w*Path|collections\.OrderedDict"
    r"|megatron\.core\.dist_checkpointing\.strategies\.torch\.(MCoreMetadata|MCoreSavePlan)"  # of megatron-core 0.15
)

# Arguments of the classes that our own index has as calls.
CALLED_WITH = {
    "MetadataIndex": ("fqn", "offset", "index"),
    "_StorageInfo": ("relative_path", "offset", "length", "transform_descriptors"),
}
MAX_INDEX_BYTES = 1 << 30  # at 16,384 ranks of full fine-tuning it has some 120 MiB
_MAX_KEY_PARTS = 1000  # of a tuple that is a key of a dict
_OPCODES = pickle._Unpickler.dispatch  # pyright: ignore[reportAttributeAccessIssue]
_REFUSED_OPCODES = (pickle.ADDITEMS, pickle.FROZENSET, pickle.BYTEARRAY8, pickle.EXT1, pickle.EXT2, pickle.EXT4)

# What reading a torn archive, or the pickle in it, may raise.
TORN = (
    *(ArithmeticError, AttributeError, EOFError, LookupError, RuntimeError, TypeError, ValueError),
    *(pickle.UnpicklingError, struct.error, zipfile.BadZipFile),
)

Kind = TypeVar("Kind")


class Inert:
    """Replaces a class or function of a pickle: accepts anything, does nothing, and keeps state as attributes."""

    arguments: tuple[Any, ...] = ()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.arguments = args

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state if isinstance(state, dict) else {"state": state})


def load_inertly(path: Path) -> Any:
    """Content of a torch.save file, with memory-mapped tensors and objects of known libraries as `Inert`.

    Raises ConfigurationError: it names anything else, or it is truncated. Nothing in it was run.
    """
    declared = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()  # megatron-core adds to torch's list of safe classes when it is imported
    try:
        require_harmless(path)
        names = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
        _refuse(path, [name for name in names if not INERT_NAMES.fullmatch(name)])
        # One class for each name: torch's unpickler looks classes up by value.
        stand_ins: list[Any] = [(type("Inert_" + name.rpartition(".")[2], (Inert,), {}), name) for name in names]
        with torch.serialization.safe_globals(stand_ins):
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except ConfigurationError:
        raise
    except (*TORN, OSError) as error:
        message = f"{path} cannot be read: it is truncated, or not a file of torch.save ({plain_reason(error)})."
        raise ConfigurationError(message) from error
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(declared)


def require_harmless(path: Path) -> None:
    """Unpickle a torch.save file without its tensors, to find out whether torch would crash. Takes milliseconds.

    Raises pickle.UnpicklingError, RuntimeError and the like: torch would crash, or the file is truncated.
    """
    with torch.serialization._open_zipfile_reader(str(path)) as archive:
        if archive.has_record("data.pkl"):
            _Rehearsal(io.BytesIO(archive.get_record("data.pkl"))).load()


def plain_reason(error: BaseException) -> str:
    """First line of an error. torch's own, which advises to allow code in the file, is replaced."""
    named = re.search(r"GLOBAL ([\w.]+)", str(error))
    if "weights_only" in str(error):
        return f"it names {named[1]}" if named else "it holds more than tensors"
    return str(error).strip().partition("\n")[0]


def read_metadata(folder: Path) -> Metadata:
    """The index of a distributed checkpoint: its tensors, and where each slice is stored; no other objects.

    Raises ConfigurationError: it names a class that no index needs or a file outside `folder`, it is truncated, or
    slices of a tensor are missing. Nothing in it was run.
    """
    path = folder / ".metadata"
    unpickler = _IndexUnpickler(path)
    try:
        with without_collection():
            return unpickler.index()
    except ConfigurationError:
        raise
    except Exception as error:  # noqa: BLE001 - a torn pickle raises anything
        raise ConfigurationError(
            f"{path} cannot be read: {type(error).__name__}: {error}. Copy the checkpoint again."
        ) from error


@contextmanager
def without_collection() -> Iterator[None]:
    """Make millions of objects that all stay: collecting them again and again takes longer than making them."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def require_loadable(path: Path, index: Metadata) -> None:
    """Raises ConfigurationError if an index that was just written to `path` is one that `read_metadata` refuses."""
    size = path.stat().st_size
    require(
        size <= MAX_INDEX_BYTES,
        f"its index has {size >> 20} MiB, and above {MAX_INDEX_BYTES >> 20} MiB it is not read. Fewer data-parallel "
        f"ranks cut the optimizer's state into fewer slices, and --no-save-optim leaves it out.",
    )
    _refuse_torn(path, _torn(index.state_dict_metadata))


def _torn(tensors: Mapping[str, Any]) -> list[str]:
    """Tensors of which slices are missing, or there twice."""
    is_whole: dict[Any, bool] = {}  # states of a parameter are cut alike, into slices that are the same objects
    keys = {key: (tensor.size, *map(id, tensor.chunks)) for key, tensor in tensors.items()}
    for key, cut in keys.items():
        if cut not in is_whole:
            is_whole[cut] = _is_whole(tensors[key])
    return [key for key, cut in keys.items() if not is_whole[cut]]


def _refuse_torn(path: Path, torn: Sequence[str]) -> None:
    require(
        not torn,
        f"{path} is damaged: slices are missing from {''.join(torn[:1])} ({len(torn)} in all). Copy the checkpoint.",
    )


class BoundedUnpickler(pickle._Unpickler):  # pyright: ignore[reportAttributeAccessIssue]
    """Python's unpickler in Python, which no pickle can crash. file: in memory.

    The one in C overflows the stack if a tuple that is nested a million deep becomes a key, and allocates a table as
    large as the largest memo index.
    """

    def load(self) -> Any:
        """What Python's own does, with all bytes in memory: its loop asks two functions of Python for each of them."""
        self.read, self.readline = self._file_read, self._file_readline
        self.metastack, self.stack, self.proto = [], [], 0
        self.append = self.stack.append
        read, dispatch = self.read, dict[int, Any](self.dispatch)
        try:
            while key := read(1):
                dispatch[key[0]](self)
        except pickle._Stop as stop:  # pyright: ignore[reportAttributeAccessIssue]
            return stop.value
        raise EOFError("its end is missing")

    def load_frame(self) -> None:
        self.read(8)  # the number of bytes that follow as they would without a frame

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
        **{
            pickle.FRAME[0]: load_frame,
            pickle.DICT[0]: load_dict,
            pickle.SETITEM[0]: load_setitem,
            pickle.SETITEMS[0]: load_setitems,
        },
    }


def _require_small(keys: list[Any]) -> None:
    """Refuse large tuples: hashing visits every part, however deep and however often it occurs."""
    for key in keys:
        parts = [key] if isinstance(key, tuple | list) else []
        for _ in range(_MAX_KEY_PARTS):
            if not parts:
                break
            part = parts.pop()
            parts += part if isinstance(part, tuple | list) else ()
        if parts:
            raise pickle.UnpicklingError(f"a key is a tuple of more than {_MAX_KEY_PARTS} parts")


class Collection(dict):
    """Replaces an OrderedDict (perhaps of pairs) or a set; its state is the `_metadata` of a state dict."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__()
        _require_small([item for items in arguments if isinstance(items, tuple | list) for item in items])

    def __setstate__(self, state: Any) -> None:
        pass


class _Rehearsal(BoundedUnpickler):
    """Reads a pickle and drops the result."""

    def find_class(self, module: str, name: str) -> Any:
        return type(name, (Inert if module not in ("collections", "builtins", "__builtin__") else Collection,), {})

    def persistent_load(self, pid: Any) -> Any:
        return Inert()


class _IndexUnpickler(BoundedUnpickler):
    """Gives each name in the pickle its own empty class, and builds torch's objects from what it read.

    A pickle may set attributes on whatever it names: on torch's classes it could add a `__call__`, or make one object
    look like another. Here it only reaches classes that nothing else uses.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(io.BytesIO(read_bytes(path, MAX_INDEX_BYTES)))
        self._path = path
        self._classes: dict[str, type[Inert]] = {}
        self._built: dict[tuple[str, int], Any] = {}  # by what stands for it in what was read, which stays

    def find_class(self, module: str, name: str) -> Any:
        whole = f"{module}.{name}"
        if whole == "builtins.getattr":
            return self._classes.setdefault(name, type(name, (Inert,), {"__init__": self._check_member}))
        known = module == torch_metadata.__name__ and name in METADATA_CLASSES
        if not known and not METADATA_NAMES.fullmatch(whole):
            _refuse(self._path, [whole])
        if isinstance(dtype := getattr(torch, name, None), torch.dtype) and module == "torch":
            return dtype
        return self._classes.setdefault(name, type(name, (Inert,), {}))

    def _check_member(self, *arguments: Any) -> None:
        """Python 3.11.0 to 3.11.3 pickle a member of an enumeration as getattr(enumeration, name)."""
        is_member = len(arguments) == 2 and type(arguments[1]) is str
        if not is_member or arguments[0] is not self._classes.get(MEMORY_FORMAT):
            _refuse(self._path, ["builtins.getattr"])

    def index(self) -> Metadata:
        root = self.load()
        is_index = any(type(root) is self._classes.get(name) for name in ("Metadata", "MCoreMetadata"))
        require(is_index, f"{self._path} is not an index of a distributed checkpoint.")
        stored = self._typed(vars(root)["state_dict_metadata"], dict)
        tensors = {
            self._typed(key, str): self._tensor(entry)
            for key, entry in stored.items()
            if type(entry) is not self._classes.get("BytesStorageMetadata")
        }
        places = dict(map(self._place, self._typed(vars(root)["storage_data"], dict).items()))
        _refuse_torn(self._path, _torn(tensors))
        slices = (MetadataIndex(key, chunk.offsets) for key, tensor in tensors.items() for chunk in tensor.chunks)
        _refuse_torn(self._path, sorted({entry.fqn for entry in slices if entry not in places}))
        return Metadata(tensors, storage_data={key: place for key, place in places.items() if key.fqn in tensors})  # type: ignore[arg-type]

    def _tensor(self, entry: Any) -> TensorStorageMetadata:
        fields = self._state(entry, "TensorStorageMetadata")
        dtype, *_ = self._typed(self._state(fields["properties"], "TensorProperties")["state"], tuple)
        return TensorStorageMetadata(
            torch_metadata.TensorProperties(self._typed(dtype, torch.dtype)),
            self._size(fields["size"]),
            [self._once(self._chunk, chunk) for chunk in self._typed(fields["chunks"], list)],
        )

    def _chunk(self, value: Any) -> ChunkStorageMetadata:
        fields = self._state(value, "ChunkStorageMetadata")
        return ChunkStorageMetadata(*(self._once(self._size, fields[name]) for name in ("offsets", "sizes")))

    def _place(self, item: tuple[Any, Any]) -> tuple[MetadataIndex, _StorageInfo]:
        key, place = self._state(item[0], "MetadataIndex"), self._state(item[1], "_StorageInfo")
        offset, file = key.get("offset"), self._typed(place["relative_path"], str)
        require(
            file == Path(file).name and file != ".." and not place.get("transform_descriptors"),
            f"{self._path} is refused: it names {file!r}, which is not a file name in that folder.",
        )
        index = MetadataIndex(self._typed(key["fqn"], str), None if offset is None else self._once(self._size, offset))
        return index, _StorageInfo(file, self._count(place["offset"]), self._count(place["length"]))

    def _once(self, build: Callable[[Any], Kind], value: Any) -> Kind:
        key = build.__name__, id(value)
        if key not in self._built:
            self._built[key] = build(value)
        return self._built[key]

    def _state(self, value: Any, name: str) -> dict[str, Any]:
        """Attributes of an object, which was pickled with them or as a call."""
        state = vars(self._typed(value, self._classes[name]))
        return {**dict(zip(CALLED_WITH.get(name, ()), value.arguments, strict=False)), **state}

    def _size(self, value: Any) -> torch.Size:
        (numbers,) = self._state(value, "Size")["arguments"]
        return torch.Size(map(self._count, self._typed(numbers, tuple)))

    def _count(self, value: Any) -> int:
        if not 0 <= self._typed(value, int) < 2**63:
            raise ConfigurationError(f"{self._path} is not an index of a distributed checkpoint: {value}.")
        return value

    def _typed(self, value: Any, kind: type[Kind]) -> Kind:
        """`value`, if it has exactly this class: a subclass could be anything."""
        if type(value) is not kind:  # no `require`: the message of a million values would take seconds
            raise ConfigurationError(
                f"{self._path} is not an index of a distributed checkpoint: it holds {type(value).__name__} instead of "
                f"{kind.__name__}."
            )
        return value


_MAX_DIMS = 8  # a slice has two corners in each


def _is_whole(tensor: Any) -> bool:
    """Whether each element of a tensor of an index lies in exactly one of its slices."""
    # Count +1 and -1 at the corners of a box in turn: those of the slices add up to those of the tensor only if the
    # slices fill it, since each box is the sum of its corners' counts up to each index.
    num_dims, counts = len(tensor.size), defaultdict[tuple[int, ...], int](int)
    if num_dims > _MAX_DIMS:
        return False
    signs = [(-1) ** sum(ends) for ends in product((0, 1), repeat=num_dims)]
    whole = ChunkStorageMetadata(torch.Size([0] * num_dims), tensor.size)
    for box, factor in [(whole, 1), *((chunk, -1) for chunk in tensor.chunks)]:
        if not len(box.offsets) == len(box.sizes) == num_dims:
            return False
        ends = [(start, start + size) for start, size in zip(box.offsets, box.sizes, strict=True)]
        for corner, sign in zip(product(*ends), signs, strict=True):
            counts[corner] += factor * sign
    return not any(counts.values())


def _refuse(path: Path, names: list[str]) -> None:
    require(
        not names,
        f"{path} is refused: to unpickle it would call {', '.join(sorted(names))}, which no checkpoint needs. "
        f"Nothing of it was run.",
    )
