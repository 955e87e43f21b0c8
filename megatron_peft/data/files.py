"""The records of several sources, one after the other, read by `datasets` through its memory-mapped cache.

A file of JSON lines is a table of texts with a row for each line, and a line is parsed when it is read: a record has
its own fields, and an error names the line. An array in a `.json` file is loaded whole. Code of a dataset is never run.
"""

import json
import zlib
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from glob import escape
from itertools import accumulate
from pathlib import Path
from typing import Any

from megatron_peft.config import ConfigurationError, kind_of_source, require
from megatron_peft.config.sources import DATA_FILES, local_folder
from megatron_peft.config.untrusted import parse_json, read_text, require_regular

Record = dict[str, Any]
_BLOCK_BYTES = 1 << 20


class RecordFiles:
    """All records of several sources in a row.

    lengths: number of records of each source; ends: their sums; digest: a CRC-32 of each.
    """

    def __init__(
        self, paths: Sequence[str], flag: str, cache_dir: Path | None = None, digests: Sequence[str] | None = None
    ) -> None:
        """Open the sources.

        Args:
            paths: files, folders and names of the Hub (`config.sources.kind_of_source`).
            flag: the flag that named them.
            cache_dir: where `datasets` keeps its tables; None: its own cache.
            digests: those of `digests_of`; None: the files are read for them.

        Raises:
            ConfigurationError: a source is missing, empty, or cannot be read.
        """
        self.paths, digests = tuple(paths), digests_of(paths, flag) if digests is None else digests
        self.digest = " ".join(digests)
        self._sources = [_open(*each, flag, cache_dir) for each in zip(paths, digests, strict=True)]
        self.lengths = [len(source) for source in self._sources]
        self.ends = list(accumulate(self.lengths))
        self._fields = cache(lambda first: tuple(self[first]))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, index: int) -> Record:
        source, row = self._locate(index)
        record = source[row]
        if not isinstance(record, dict):
            raise ConfigurationError(f"{source.place(row)}: not a JSON object but {type(record).__name__}.")
        return record

    def place(self, index: int) -> str:
        """Return `FILE, line N` (`FILE, record N` in an array, `FILE, row N` in a table), counted from one."""
        source, row = self._locate(index)
        return source.place(row)

    def first_of_file(self, index: int) -> tuple[int, tuple[str, ...]]:
        """Return the first record of the source that holds a record, and its fields."""
        first = index - self._locate(index)[1]
        return first, self._fields(first)

    def _locate(self, index: int) -> "tuple[_Source, int]":
        if not 0 <= index < len(self):
            raise IndexError(index)
        which = bisect_right(self.ends, index)
        return self._sources[which], index - (self.ends[which - 1] if which else 0)


@dataclass(frozen=True)
class _Source:
    """unit: of a place: line, record or row. numbers: of the lines that are not blank, from 0; None: all."""

    path: str
    rows: Any  # sequence of records; of JSON lines a `datasets.Dataset` of texts
    unit: str
    numbers: Sequence[int] | None = None

    def __len__(self) -> int:
        return len(self.rows) if self.numbers is None else len(self.numbers)

    def __getitem__(self, index: int) -> Any:
        row = self.rows[self._number(index)]
        return _parse(row["text"], self.place(index)) if self.unit == "line" else row

    def place(self, index: int) -> str:
        return f"{self.path}, {self.unit} {self._number(index) + 1}"

    def _number(self, index: int) -> int:
        return index if self.numbers is None else int(self.numbers[index])


def _parse(text: str, place: str) -> Any:
    try:
        return parse_json(text, place)
    except ConfigurationError as error:
        if not isinstance(error.__cause__, json.JSONDecodeError):
            raise
        raise ConfigurationError(
            f"{error} A file holds one JSON object a line, or, named .json, one array of objects."
        ) from error


def digests_of(paths: Sequence[str], flag: str) -> list[str]:
    """Return the CRC-32 of each source's files; of a dataset of the Hub that of its name and commit.

    Raises:
        ConfigurationError: a file is missing, is a pipe or a device, or cannot be read.
    """
    return [f"{_crc32(path, flag):08x}" for path in paths]


def _crc32(path: str, flag: str) -> int:
    kind, place = kind_of_source(path), _place(path, flag)
    if kind == "hub":  # whose folder is named by the commit
        return zlib.crc32(f"{place.name} {path}".encode())
    crc32 = 0
    for file in sorted(file for file in place.rglob("*") if not file.is_dir()) if place.is_dir() else [place]:
        require_regular(file, flag)
        try:
            with file.open("rb") as opened:
                for block in iter(partial(opened.read, _BLOCK_BYTES), b""):
                    crc32 = zlib.crc32(block, crc32)
        except OSError as error:
            raise ConfigurationError(f"{flag} {file} cannot be read: {error.strerror}.") from error
    return crc32


def _place(path: str, flag: str) -> Path:
    """Return the file or folder of a source: a dataset of the Hub is downloaded first."""
    kind, name = kind_of_source(path), path.split(":")[0]
    if kind == "hub":
        return Path(local_folder(name, flag, DATA_FILES, "dataset"))
    return Path(name) if kind == "table" and Path(name).is_dir() else Path(path)


def _open(path: str, digest: str, flag: str, cache_dir: Path | None) -> _Source:
    """Raises ConfigurationError if a source is empty or cannot be read, or has several splits and none is chosen."""
    import datasets

    datasets.disable_progress_bars()
    place, choice = _place(path, flag), path.split(":")[1:]
    # Named by the contents: the tables of `datasets` are otherwise found again by path and time.
    load = partial(_loaded, name=f"crc32-{digest}", cache_dir=None if cache_dir is None else str(cache_dir))
    try:
        if place.is_dir():
            source = _Source(path, _split_of(place, choice, f"{flag} {path.split(':')[0]}", load), "row")
        elif kind_of_source(path) == "table":
            source = _Source(path, _rows_of(place, load), "row")
        elif _holds_array(place):
            source = _Source(path, _parse(read_text(place), path), "record")
        else:
            files = {"data_files": escape(str(place.absolute())), "encoding": "utf-8-sig"}
            rows = load("text", **files)["train"] if place.stat().st_size else []
            source = _Source(path, rows, "line", _numbers_of_lines(rows))
    except ConfigurationError:
        raise
    except Exception as error:  # noqa: BLE001 - of datasets, pyarrow, pandas
        cause = error.__cause__ or error
        if isinstance(cause, UnicodeDecodeError):
            raise ConfigurationError(f"{flag} {path} is not text in UTF-8: {cause}. Save it as UTF-8.") from error
        text = str(cause).strip().splitlines() or [""]
        raise ConfigurationError(f"{flag} {path} cannot be read: {type(cause).__name__}: {text[0][:300]}") from error
    require(len(source) > 0, f"{flag} {path} is empty: it holds no record.")
    return source


def _holds_array(path: Path) -> bool:
    """Return True if a JSON file is one array, False if it has a value on each line."""
    with path.open("rb") as file:
        return path.suffix == ".json" and file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")


def _numbers_of_lines(rows: Any) -> Any:
    """Return the numbers of the rows that are not blank, int [records], or None where all are."""
    import numpy as np
    import pyarrow.compute as pc

    chunks = rows.data.column("text").chunks if len(rows) else []
    is_text = [pc.not_equal(pc.utf8_trim_whitespace(chunk), "").to_numpy(zero_copy_only=False) for chunk in chunks]
    return None if all(one.all() for one in is_text) else np.flatnonzero(np.concatenate(is_text))


def _rows_of(path: Path, load: Callable[..., Any]) -> Any:
    """Return the rows of a Parquet, CSV or Arrow file."""
    import datasets

    if path.suffix == ".arrow":
        try:
            return datasets.Dataset.from_file(str(path))
        except Exception:  # noqa: BLE001 - Arrow's other format, of files and not of streams; read below
            pass
    return load(path.suffix[1:], data_files=escape(str(path.absolute())))["train"]


def _loaded(kind: str, name: str | None, **options: Any) -> Any:
    """Call `load_dataset`; a cell of a CSV is the text in the file."""
    import datasets

    builder: Any = datasets.load_dataset_builder(kind, name, **options)
    if builder.name == "csv":
        builder.config.chunksize = 1
        first = next(iter(next(iter(builder.as_streaming_dataset().values()))), {})
        options |= {"features": datasets.Features(dict.fromkeys(first, datasets.Value("string"))), "na_filter": False}
    return datasets.load_dataset(kind, name, **options)


def _split_of(folder: Path, choice: list[str], named: str, load: Callable[..., Any]) -> Any:
    """Return a split of a folder that `datasets` saved, or of one with Parquet, CSV or JSON files, as on the Hub."""
    import datasets

    split = choice[-1] if choice else None
    if any((folder / name).is_file() for name in ("dataset_info.json", "dataset_dict.json")):
        loaded = datasets.load_from_disk(str(folder))
    else:
        place = str(folder.resolve())
        require(escape(place) == place, f"{named}: `datasets` takes [, * and ? in {place} as a pattern: rename it.")
        loaded = load(place, name=choice[0] if len(choice) > 1 else None)
    if isinstance(loaded, datasets.Dataset):
        require(split is None, f"{named} has no splits: leave :{split} out.")
        return loaded
    names = list(map(str, loaded))
    split = split or ("train" if "train" in names else names[0] if len(names) == 1 else None)
    require(split in names, f"{named} has the splits {', '.join(names)}: give {named.split()[-1]}:{names[0]}.")
    return loaded[split]
