"""Read JSON-lines files record by record through an index of byte offsets; a `.json` array is loaded whole."""

import json
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from megatron_peft.config import ConfigurationError, require
from megatron_peft.config.untrusted import parse_json, read_bytes

MAX_LINE_BYTES = 1 << 25  # once parsed, a line takes up to 25 times as much memory
_BLOCK_BYTES = 1 << 17  # read at once
_BREAK = ord("\n")
_IS_SPACE = np.isin(np.arange(256), list(b" \t\n\r\v\f"))
_NONE = np.empty(0, dtype=np.int64)


class Lines:
    """A file with one JSON value per line; blank lines do not count. `digest` is its CRC-32. Takes 8 bytes per line."""

    def __init__(self, path: Path, with_digest: bool = True) -> None:
        """Without a digest it is 0, and the file is read twice as fast."""
        self.path = path
        self._starts, self.digest = _line_starts(path, with_digest)
        self._file = path.open("rb")
        self._size = os.fstat(self._file.fileno()).st_size
        self._counted = 0, 1  # where a line begins, and its number
        sizes = np.diff(self._starts, append=self._size)
        if len(sizes) and sizes.max() > MAX_LINE_BYTES:
            raise ConfigurationError(
                f"{self.place(int(sizes.argmax()))} has {sizes.max() / 2**20:.1f} MiB, and the limit of a line is "
                f"{MAX_LINE_BYTES / 2**20:.0f} MiB: split the record."
            )

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
        """Counts the lines up to the record, from the record of the last call if that comes before it."""
        start = int(self._starts[index])
        begin, line = self._counted if self._counted[0] <= start else (0, 1)
        blocks = ((at, min(_BLOCK_BYTES, start - at)) for at in range(begin, start, _BLOCK_BYTES))
        line += sum(os.pread(self._file.fileno(), size, at).count(b"\n") for at, size in blocks)
        self._counted = start, line
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


def open_json(path: Path, with_digest: bool = True) -> Lines | Array:
    """The records of a JSON file. Raises OSError if it cannot be read."""
    is_array = path.suffix == ".json" and _starts_with_bracket(path)
    return Array(path) if is_array else Lines(path, with_digest)


def _starts_with_bracket(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")


def _line_starts(path: Path, with_digest: bool) -> tuple[np.ndarray, int]:
    """int64 byte offsets of the lines that are not blank, and the CRC-32 of the file (0 without)."""
    starts, indented = [_NONE], [_NONE]  # all lines; those that begin with a space, which may be blank
    offset = crc = 0
    after_break = True
    block = bytearray(_BLOCK_BYTES)
    view, array = memoryview(block), np.frombuffer(block, dtype=np.uint8)
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(block):
            begins = np.append([] if not after_break else [0], np.flatnonzero(array[:size] == _BREAK) + 1)
            after_break = array[size - 1] == _BREAK
            begins = begins[begins < size].astype(np.int64)
            starts.append(begins + offset)
            indented.append(begins[_IS_SPACE[array[begins]]] + offset)
            crc = zlib.crc32(view[:size], crc) if with_digest else 0
            offset += size
        found = np.concatenate(starts)
        return np.delete(found, _blank_lines(found, np.concatenate(indented), offset, file.fileno())), crc


def _blank_lines(starts: np.ndarray, indented: np.ndarray, size: int, descriptor: int) -> list[int]:
    """Which of the lines hold nothing but spaces, among those that begin with one."""
    lines = np.searchsorted(starts, indented)
    ends = np.append(starts, size)[lines + 1]
    short = ((line, start, end - start) for line, start, end in zip(lines, indented, ends, strict=True))
    short = (one for one in short if one[2] <= MAX_LINE_BYTES)  # a longer one is an error, which need not read it
    return [int(line) for line, start, size in short if os.pread(descriptor, int(size), int(start)).isspace()]


def _decoded(raw: bytes, place: Callable[[], str]) -> str:
    try:
        text = raw.decode("utf-8-sig")
        if "\0" in text:
            raise ValueError("it holds NUL bytes, as UTF-16 does")
        return text
    except ValueError as error:
        raise ConfigurationError(f"{place()}: not text in UTF-8: {error}. Save the file as UTF-8.") from error


def _parse(raw: bytes, place: Callable[[], str]) -> Any:
    text = _decoded(raw, place)
    try:
        return parse_json(text, place)
    except ConfigurationError as error:
        if not isinstance(error.__cause__ and error.__cause__.__cause__, json.JSONDecodeError):
            raise
        raise ConfigurationError(
            f"{error} A file holds one JSON object a line, or, named .json, one array of objects."
        ) from error
