"""The records of several sources, one after the other: JSON files, tables, and data sets of the Hub.

A JSON-lines file is read record by record through an index of byte offsets, an array in a `.json` file is loaded whole.
Parquet, CSV, Arrow, folders that `datasets` saved and the Hub are read by `datasets` through its memory-mapped cache.
Code of a dataset is never run.
"""

import json
import os
import re
import zlib
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from glob import escape
from itertools import accumulate
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from megatron_peft.checkpoint.folders import measure
from megatron_peft.config import ConfigurationError, kind_of_source, require
from megatron_peft.config.sources import DATA_FILES, local_folder
from megatron_peft.config.untrusted import parse_json, read_bytes, require_regular

Record = dict[str, Any]
MAX_LINE_BYTES = 1 << 25  # once parsed, a line takes up to 25 times as much memory
_BLOCK_BYTES = 1 << 17


class LineIndex(NamedTuple):
    """Where the lines of a file are, and its CRC-32."""

    starts: Any  # int64 [records]: of each record, in bytes
    blanks: Any  # int64 [blank lines]: the records before each
    end: int  # of the file, in bytes
    digest: int


class Scan(NamedTuple):
    """Figures of the lines that begin in a slice of a file; too_long: the last of them is above the limit."""

    records: int
    blanks: int
    begin: int  # in bytes
    end: int
    crc: int
    too_long: bool


def scan(path: Path, within: range) -> "tuple[Scan, array[int], array[int]]":
    """The lines that begin within a range of bytes; their `starts` and `blanks` (see `LineIndex`).

    Raises OSError if the file cannot be read.
    """
    starts, blanks, crc, too_long = array("q"), array("q"), 0, False
    with path.open("rb", buffering=_BLOCK_BYTES) as file:
        offset = file.seek(max(within.start - 1, 0))
        # The line that holds the byte before begins before.
        while within.start and offset < within.stop and (skipped := file.readline(_BLOCK_BYTES)):
            offset += len(skipped)
            if skipped.endswith(b"\n"):
                break
        begin = offset
        while offset < within.stop and not too_long and (line := file.readline(MAX_LINE_BYTES + 1)):
            if line.isspace():
                blanks.append(len(starts))
            else:
                starts.append(offset)
            crc = zlib.crc32(line, crc)
            offset += len(line)
            too_long = len(line) > MAX_LINE_BYTES
    return Scan(len(starts), len(blanks), begin, offset, crc, too_long), starts, blanks


def digest_of_scans(path: str | Path, scans: Sequence[Scan], size: int) -> int:
    """CRC-32 of a file, all of which was scanned. Raises ConfigurationError for a line above the limit, and for less
    than `size` bytes."""
    number = crc = end = 0
    for scan in scans:
        if scan.begin == scan.end:  # no line begins there: a long one goes on
            continue
        require(scan.begin == end, f"{path} was changed while it was being read: start again.")
        end = scan.end
        number += scan.records + scan.blanks
        require(
            not scan.too_long,
            f"{path}, line {number} is too long, and the limit of a line is {MAX_LINE_BYTES / 2**20:.0f} MiB: split "
            "the record.",
        )
        crc = crc32_combine(crc, scan.crc, scan.end - scan.begin)
    require(end >= size, f"{path} {_SHORTENED}")
    return crc


_SHORTENED = "was shortened while it was being read: put it back."


def crc32_combine(first: int, second: int, num_bytes: int) -> int:
    """CRC-32 of two pieces, one after the other; `second` has so many bytes. As in zlib, which Python lacks."""
    factor, square = 1 << 31, 1 << 23  # x^0 and x^8, to be x^(8 num_bytes): the highest bit is the lowest power
    while num_bytes:
        factor = _product(factor, square) if num_bytes & 1 else factor
        square, num_bytes = _product(square, square), num_bytes >> 1
    return _product(factor, first) ^ second


def _product(a: int, b: int) -> int:
    """The product of two polynomials over GF(2), modulo that of CRC-32."""
    product = 0
    for bit in range(31, -1, -1):
        product ^= b if a >> bit & 1 else 0
        b = b >> 1 ^ (0xEDB88320 if b & 1 else 0)
    return product


class Lines:
    """A file with one JSON value per line; blank lines do not count. `digest` is its CRC-32.

    index: of the file; None: it is made, and takes 8 bytes per line.
    Raises ConfigurationError for a line above MAX_LINE_BYTES.
    """

    def __init__(self, path: Path, index: LineIndex | None = None) -> None:
        self.path = path
        self._file = path.open("rb", buffering=0)
        if index is None:
            size = os.fstat(self._file.fileno()).st_size
            scanned, starts, blanks = scan(path, range(size))
            index = LineIndex(starts, blanks, scanned.end, digest_of_scans(path, [scanned], size))
        self._starts, self._blanks, self._end, self.digest = index

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> Any:
        start, following = int(self._starts[index]), index + 1
        end = int(self._starts[following]) if following < len(self) else self._end
        # Read, not mapped: SIGBUS kills a process that reads a map of a file which another one has shortened.
        raw = os.pread(self._file.fileno(), end - start, start)
        require(len(raw) == end - start, f"{self.path} {_SHORTENED}")
        return _parse(raw, lambda: self.place(index))

    def place(self, index: int) -> str:
        """FILE, line N of a record, for errors; counted from one."""
        return f"{self.path}, line {index + 1 + bisect_right(self._blanks, index)}"


class Rows:
    """Records of an array in memory, or of a mapped table.

    digest: CRC-32 of the files, or of the Hub's name and commit; unit: "record" or "row", for errors.
    """

    def __init__(self, path: str, rows: Any, digest: int, unit: str = "row") -> None:
        self.path, self.rows, self.digest, self.unit = path, rows, digest, unit

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.rows[index]

    def place(self, index: int) -> str:
        """FILE, record N (or row N), counted from one."""
        return f"{self.path}, {self.unit} {index + 1}"


@contextmanager
def opening(path: str, flag: str) -> Iterator[None]:
    """Raises ConfigurationError if the file that the flag named cannot be read, or is none."""
    require_regular(Path(path), flag)
    try:
        yield
    except OSError as error:
        raise ConfigurationError(f"{flag} {path} cannot be read: {error.strerror}.") from error


def holds_lines(path: Path) -> bool:
    """Whether a JSON file has a value on each line, and not one array. Raises OSError if it cannot be read."""
    with path.open("rb") as file:
        return path.suffix != ".json" or not file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")


def open_json(path: Path, index: LineIndex | None = None) -> Lines | Rows:
    """The records of a JSON file. Raises OSError if it cannot be read."""
    if holds_lines(path):
        return Lines(path, index)
    raw = read_bytes(path)  # an array cannot be split without parsing it
    return Rows(str(path), _parse(raw, lambda: str(path)), zlib.crc32(raw), "record")


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
        if not isinstance(error.__cause__, json.JSONDecodeError):
            raise
        raise ConfigurationError(
            f"{error} A file holds one JSON object a line, or, named .json, one array of objects."
        ) from error


Known = Mapping[str, LineIndex | int]  # by path, of JSON lines the index and of a table the digest


class RecordFiles:
    """All records in a row. lengths: number of records of each source; ends: their sums; digest: a CRC-32 of each."""

    def __init__(self, paths: Sequence[str], flag: str, known: Known = MappingProxyType({})) -> None:
        """`flag` is the one that named the paths. Raises ConfigurationError for a missing or an empty source."""
        self.paths = tuple(paths)
        self._files = [_open(path, flag, known.get(path)) for path in paths]
        self.digests = {path: file.digest for path, file in zip(paths, self._files, strict=True)}
        self.lengths = [len(file) for file in self._files]
        self.ends = list(accumulate(self.lengths))
        self.digest = " ".join(f"{file.digest:08x}" for file in self._files)
        self._fields = cache(lambda first: tuple(self[first]))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

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

    def first_of_file(self, index: int) -> tuple[int, tuple[str, ...]]:
        """The first record of the source that holds a record, and its fields."""
        first = index - self._locate(index)[1]
        return first, self._fields(first)

    def _locate(self, index: int) -> tuple[Lines | Rows, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        which = bisect_right(self.ends, index)
        return self._files[which], index - (self.ends[which - 1] if which else 0)


def _open(path: str, flag: str, known: LineIndex | int | None) -> Lines | Rows:
    if kind_of_source(path) in ("table", "hub"):
        file = _open_table(path, flag, known if isinstance(known, int) else None)
    else:
        with opening(path, flag):
            file = open_json(Path(path), known if isinstance(known, LineIndex) else None)
    require(len(file) > 0, f"{flag} {path} is empty: it holds no record.")
    return file


def _open_table(path: str, flag: str, digest: int | None) -> Rows:
    """The table that `path` names: a file, FOLDER[:SPLIT] or ORG/NAME[[:CONFIG]:SPLIT]. digest: None: it is read.

    Raises ConfigurationError if it cannot be read, or has several splits and none is chosen.
    """
    import datasets

    name, *choice = path.split(":")
    files: list[Path] = []
    if kind_of_source(path) == "hub":
        folder = Path(local_folder(name, flag, DATA_FILES, "dataset"))
    else:
        folder = Path(name)
        files = sorted(file for file in folder.rglob("*") if not file.is_dir()) if folder.is_dir() else [Path(path)]
    for file in files if digest is None else ():
        require_regular(file, flag)
        require_limits(file, flag)
    datasets.disable_progress_bars()
    try:
        rows = _split_of(folder, choice, f"{flag} {name}") if folder.is_dir() else _rows_of(Path(path))
        if digest is None:  # the folder of a dataset of the Hub is named by its commit
            digest = 0 if files else zlib.crc32(f"{folder.name} {path}".encode())
            for size, crc32 in map(measure, files):
                digest = crc32_combine(digest, int(crc32, 16), size)
        return Rows(path, rows, digest)
    except ConfigurationError:
        raise
    except Exception as error:  # noqa: BLE001 - of datasets, pyarrow, pandas
        cause = error.__cause__ or error
        text = str(cause).strip().splitlines() or [""]
        raise ConfigurationError(f"{flag} {path} cannot be read: {type(cause).__name__}: {text[0][:300]}") from error


def _rows_of(path: Path) -> Any:
    """The rows of a Parquet, CSV or Arrow file."""
    import datasets

    if path.suffix == ".arrow":
        try:
            return datasets.Dataset.from_file(str(path))
        except Exception:  # noqa: BLE001 - Arrow's other format, of files and not of streams; read below
            pass
    return _loaded(path.suffix[1:], data_files=escape(str(path.absolute())))["train"]


def _loaded(*given: Any, **options: Any) -> Any:
    """What `datasets` loads; a cell of a CSV is the text in the file."""
    import datasets

    builder: Any = datasets.load_dataset_builder(*given, **options)
    if builder.name == "csv":
        builder.config.chunksize = 1
        first = next(iter(next(iter(builder.as_streaming_dataset().values()))), {})
        options |= {"features": datasets.Features(dict.fromkeys(first, datasets.Value("string"))), "na_filter": False}
    return datasets.load_dataset(*given, **options)


def _split_of(folder: Path, choice: list[str], named: str) -> Any:
    """A split of a folder that `datasets` saved, or of one with Parquet, CSV or JSON files, as on the Hub."""
    import datasets

    split = choice[-1] if choice else None
    if any((folder / name).is_file() for name in ("dataset_info.json", "dataset_dict.json")):
        loaded = datasets.load_from_disk(str(folder))
    else:
        place = str(folder.resolve())
        require(escape(place) == place, f"{named}: `datasets` takes [, * and ? in {place} as a pattern: rename it.")
        loaded = _loaded(str(folder), choice[0] if len(choice) > 1 else None)
    if isinstance(loaded, datasets.Dataset):
        require(split is None, f"{named} has no splits: leave :{split} out.")
        return loaded
    names = list(map(str, loaded))
    split = split or ("train" if "train" in names else names[0] if len(names) == 1 else None)
    require(split in names, f"{named} has the splits {', '.join(names)}: give {named.split()[-1]}:{names[0]}.")
    return loaded[split]


MAX_COLUMNS = 4096  # `datasets` takes a minute for 100,000
# In a Parquet file one cell may stand for a billion: what it unpacks to is counted, unless it is large anyway.
MAX_RATIO, ALWAYS_BYTES, COUNTED_BYTES = 1000, 1 << 26, 1 << 26
_ROWS = 256  # unpacked at once


def require_limits(path: Path, flag: str) -> None:
    """Raises ConfigurationError for too many columns or too much in little. What cannot be read `datasets` says."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    num_columns, unpacked_bytes, size = 0, 0, path.stat().st_size
    most_bytes = max(ALWAYS_BYTES, MAX_RATIO * size)
    try:
        if path.suffix == ".parquet":
            stored = pq.read_metadata(path)
            num_columns = stored.num_columns
            groups = [stored.row_group(number).total_byte_size for number in range(stored.num_row_groups)]
            unpacked_bytes = sum(groups) if sum(groups) > most_bytes else 0  # as the file says; a row repeats any of it
            num_rows = min(_ROWS, max(1, most_bytes // max(1, *groups))) if groups else _ROWS
            is_counted = size <= COUNTED_BYTES and num_columns <= MAX_COLUMNS and not unpacked_bytes
            for batch in pq.ParquetFile(path).iter_batches(num_rows) if is_counted else ():
                unpacked_bytes += batch.nbytes
                if unpacked_bytes > most_bytes:
                    break
        elif path.suffix == ".arrow":
            num_columns = len(pa.ipc.open_stream(pa.memory_map(str(path))).schema)
        elif path.suffix == ".csv":
            with path.open("rb") as file:
                # The second line counts too: a header may have fewer columns.
                lines = [re.sub(rb'"[^"]*"', b"", file.readline(MAX_LINE_BYTES)) for _ in range(2)]
                num_columns = max(line.count(b",") for line in lines) + 1
    except (pa.ArrowException, OSError):
        pass
    require(
        num_columns <= MAX_COLUMNS,
        f"{flag} {path} has {num_columns:,} columns, and the limit is {MAX_COLUMNS:,}: leave out what nothing reads.",
    )
    require(
        unpacked_bytes <= most_bytes,
        f"{flag} {path} has {size:,} bytes and unpacks to more than {most_bytes:,}, the limit of its size: it repeats "
        "the same values over and over.",
    )
