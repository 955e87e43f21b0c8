"""The records of several sources, JSON files or tables, one after the other, each with its place."""

from bisect import bisect_right
from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

from megatron_peft.config import ConfigurationError, kind_of_source, require
from megatron_peft.config.untrusted import require_regular
from megatron_peft.data.formats import Record
from megatron_peft.data.jsonl import open_json


class RecordFile(Protocol):
    """Records of one source by number."""

    digest: int  # CRC-32 of what it holds

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...

    def place(self, index: int) -> str: ...


class RecordFiles:
    """The records of several sources, one after the other.

    lengths: number of records of each.
    """

    def __init__(self, paths: Sequence[str], flag: str, with_digest: bool = True) -> None:
        """`flag` is the one that named the paths. Raises ConfigurationError for a missing or an empty source."""
        self.paths = tuple(paths)
        self._files = [_open(path, flag, with_digest) for path in paths]
        self.lengths = [len(file) for file in self._files]
        self._ends = list(accumulate(self.lengths))
        self.digest = " ".join(f"{file.digest:08x}" for file in self._files)
        self._fields = cache(lambda first: tuple(self[first]))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Record:
        file, local = self._locate(index)
        record = file[local]
        if not isinstance(record, dict):
            raise ConfigurationError(f"{file.place(local)}: not a JSON object but {type(record).__name__}.")
        return record

    def place(self, index: int) -> str:
        """`FILE, line N` (or `FILE, record N` in an array, `FILE, row N` in a table)."""
        file, local = self._locate(index)
        return file.place(local)

    def first_of_file(self, index: int) -> int:
        """The first record of the source that holds a record."""
        which = bisect_right(self._ends, index)
        return self._ends[which - 1] if which else 0

    def first_fields(self, index: int) -> tuple[str, ...]:
        """The fields of that record."""
        return self._fields(self.first_of_file(index))

    def _locate(self, index: int) -> tuple[RecordFile, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._files[bisect_right(self._ends, index)], index - self.first_of_file(index)


def _open(path: str, flag: str, with_digest: bool) -> RecordFile:
    if kind_of_source(path) in ("table", "hub"):
        from megatron_peft.data.tables import open_table

        file = open_table(path, flag)
    else:
        file = _open_json(Path(path), flag, with_digest)
    require(len(file) > 0, f"{flag} {path} is empty: it holds no record.")
    return file


def _open_json(path: Path, flag: str, with_digest: bool) -> RecordFile:
    require_regular(path, flag)
    try:
        return open_json(path, with_digest)
    except OSError as error:
        raise ConfigurationError(f"{flag} {path} cannot be read: {error.strerror}.") from error
