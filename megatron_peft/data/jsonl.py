"""Read JSON-lines files record by record through an index of byte offsets; a `.json` array is loaded whole."""

import json
import os
import zlib
from array import array
from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from megatron_peft.config import ConfigurationError, require
from megatron_peft.config.untrusted import parse_json, read_bytes, require_regular

Record = dict[str, Any]
_COUNT_BYTES = 1 << 24  # read at once to count lines


class Lines:
    """A file with one JSON value per line; blank lines do not count. `digest` is its CRC-32. Takes 8 bytes per line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._starts, self.digest = _line_starts(path)
        self._file = path.open("rb")
        self._size = os.fstat(self._file.fileno()).st_size

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> Any:
        start = int(self._starts[index])
        end = int(self._starts[index + 1]) if index + 1 < len(self._starts) else self._size
        # Read, not mapped: SIGBUS kills a process that reads a map of a file which another one has shortened.
        raw = os.pread(self._file.fileno(), end - start, start)
        require(len(raw) == end - start, f"{self.path} was shortened while it was being read: put it back.")
        return _parse(raw, lambda: self.place(index))

    def place(self, index: int) -> str:
        """Counts the lines up to the record: for messages, not for loops."""
        start = int(self._starts[index])
        steps = range(0, start, _COUNT_BYTES)
        line = 1 + sum(os.pread(self._file.fileno(), min(_COUNT_BYTES, start - at), at).count(b"\n") for at in steps)
        return f"{self.path}, line {line}"


class Array:
    """A `.json` file that is one array, in memory: it cannot be split without parsing it. `digest` is its CRC-32."""

    def __init__(self, path: Path) -> None:
        self.path = path
        raw = read_bytes(path)
        self.digest = zlib.crc32(raw)
        self._records = _parse(raw, lambda: str(path))

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Any:
        return self._records[index]

    def place(self, index: int) -> str:
        """FILE, record N of a record, for errors; counted from one."""
        return f"{self.path}, record {index + 1}"


class JsonRecords:
    """The records of several files, one after the other."""

    def __init__(self, paths: Sequence[str], flag: str) -> None:
        """`flag` is the one that named the paths. Raises ConfigurationError for a missing or an empty file."""
        self._files = [_open(Path(path), flag) for path in paths]
        self._ends = list(accumulate(len(file) for file in self._files))
        self.digest = " ".join(f"{file.digest:08x}" for file in self._files)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Record:
        file, local = self._locate(index)
        record = file[local]
        if not isinstance(record, dict):
            raise ConfigurationError(f"{file.place(local)}: not a JSON object but {type(record).__name__}.")
        return record

    def place(self, index: int) -> str:
        """`FILE, line N` (or `FILE, record N` in an array)."""
        file, local = self._locate(index)
        return file.place(local)

    def _locate(self, index: int) -> tuple[Lines | Array, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        which = bisect_right(self._ends, index)
        return self._files[which], index - (self._ends[which - 1] if which else 0)


def _open(path: Path, flag: str) -> Lines | Array:
    require_regular(path, flag)
    try:
        is_array = path.suffix == ".json" and _starts_with_bracket(path)
        file = Array(path) if is_array else Lines(path)
    except OSError as error:
        raise ConfigurationError(f"{flag} {path} cannot be read: {error.strerror}.") from error
    require(len(file) > 0, f"{flag} {path} is empty: it holds no record.")
    return file


def _starts_with_bracket(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")


def _line_starts(path: Path) -> tuple[np.ndarray, int]:
    """int64 byte offsets of the lines that are not blank, and the CRC-32 of the file."""
    starts = array("q")
    offset = crc = 0
    with path.open("rb") as file:
        for line in file:
            if not line.isspace():
                starts.append(offset)
            offset += len(line)
            crc = zlib.crc32(line, crc)
    return np.frombuffer(starts, dtype=np.int64) if starts else np.empty(0, dtype=np.int64), crc


def _parse(raw: bytes, place: Callable[[], str]) -> Any:
    try:
        text = raw.decode("utf-8-sig")
        if "\0" in text:
            raise ValueError("it holds NUL bytes, as UTF-16 does")
    except ValueError as error:
        raise ConfigurationError(f"{place()}: not text in UTF-8: {error}. Save the file as UTF-8.") from error
    try:
        return parse_json(text, place)
    except ConfigurationError as error:
        if not isinstance(error.__cause__ and error.__cause__.__cause__, json.JSONDecodeError):
            raise
        raise ConfigurationError(
            f"{error} A file holds one JSON object a line, or, named .json, one array of objects."
        ) from error
