"""Pickles of other people's checkpoints, read so that nothing in them can run.

Two kinds are met. A `torch.save` file with Megatron-LM's arguments, counters and generators beside the weights is
read with `weights_only=True`; what it names of the libraries that wrote it is replaced by `Inert`, which does nothing
whatever it is called with. The index of a distributed checkpoint (`.metadata`) is a plain pickle of a few classes of
torch. A name outside the lists below refuses the file before any of it is unpickled.
"""

from __future__ import annotations

import io
import pickle
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import metadata as torch_metadata
from torch.distributed.checkpoint.metadata import Metadata

from megatron_peft.config import ConfigurationError, require

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
)


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
        with _nothing_called_safe():
            names = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
            _refuse(path, [name for name in names if not INERT_NAMES.fullmatch(name)])
            stand_ins: list[Any] = [(_stand_in(name), name) for name in names]
            with torch.serialization.safe_globals(stand_ins):
                return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (RuntimeError, OSError, EOFError, ValueError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        if isinstance(error, ConfigurationError):
            raise
        reason = str(error).strip().partition("\n")[0]
        raise ConfigurationError(f"{path} cannot be read: it is torn, or no file of torch.save ({reason}).") from error


def read_metadata(folder: Path) -> Metadata:
    """The index of a distributed checkpoint.

    Raises:
        ConfigurationError: it names a class that no index needs (and nothing of it has run), or it is torn.
    """
    path = folder / ".metadata"
    try:
        found = _MetadataUnpickler(path).load()
    except ConfigurationError:
        raise
    except Exception as error:  # noqa: BLE001 - a torn pickle raises anything
        raise ConfigurationError(
            f"{path} cannot be read: {type(error).__name__}: {error}. Copy the checkpoint again."
        ) from error
    require(isinstance(found, Metadata), f"{path} is no index of a distributed checkpoint.")
    return found


class _MetadataUnpickler(pickle.Unpickler):
    def __init__(self, path: Path) -> None:
        super().__init__(io.BytesIO(path.read_bytes()))
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        known = module == torch_metadata.__name__ and name in METADATA_CLASSES
        if not known and not METADATA_NAMES.fullmatch(f"{module}.{name}"):
            _refuse(self._path, [f"{module}.{name}"])
        return super().find_class(module, name)


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
