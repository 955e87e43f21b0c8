"""Records in Parquet, CSV and Arrow, in folders that `datasets` saved, and of the Hub: read by `datasets` through its
memory-mapped cache. Code of a dataset is never run."""

import re
import zlib
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from megatron_peft.config import ConfigurationError, kind_of_source, require
from megatron_peft.config.hub import DATA_FILES, local_folder
from megatron_peft.config.untrusted import require_regular
from megatron_peft.data.jsonl import MAX_LINE_BYTES

_SAVED, _SAVED_SPLITS = "dataset_info.json", "dataset_dict.json"
_BLOCK_BYTES = 1 << 20
MAX_COLUMNS = 4096  # `datasets` takes a minute for 100,000
# In a Parquet file one cell may stand for a billion: what it unpacks to is counted, unless it is large anyway.
MAX_RATIO, ALWAYS_BYTES, COUNTED_BYTES = 1000, 1 << 26, 1 << 26
_ROWS = 256  # unpacked at once
_QUOTED = re.compile(rb'"[^"]*"')


class DataTable:
    """Rows as records. `digest` is a CRC-32 of the files, or of the Hub's name and commit."""

    def __init__(self, path: str, rows: Any, digest: int) -> None:
        self.path = path
        self.digest = digest
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._rows[index]

    def place(self, index: int) -> str:
        return f"{self.path}, row {index + 1}"


def open_table(path: str, flag: str) -> DataTable:
    """The table that `path` names: a file, FOLDER[:SPLIT] or ORG/NAME[[:CONFIG]:SPLIT].

    Raises ConfigurationError if it cannot be read, or has several splits and none is chosen.
    """
    if Path(path).suffix and not Path(path).is_dir() and kind_of_source(path) == "table" and ":" not in path:
        return _open_file(Path(path), flag)
    name, *choice = path.split(":")
    if kind_of_source(path) == "table":
        files = sorted(one for one in Path(name).rglob("*") if not one.is_dir())
        for one in files:
            require_regular(one, flag)
            require_limits(one, flag)
        folder, digest = Path(name), _digest(files)
    else:
        folder = Path(local_folder(name, flag, DATA_FILES, "dataset"))
        digest = zlib.crc32(f"{folder.name} {path}".encode())  # the folder is named by its commit
    rows = _read(f"{flag} {path}", partial(_open_folder, folder, choice, f"{flag} {name}"))
    return DataTable(path, rows, digest)


def _open_file(path: Path, flag: str) -> DataTable:
    import datasets

    require_regular(path, flag)
    require_limits(path, flag)
    named, kind = f"{flag} {path}", path.suffix[1:]
    if kind == "arrow":
        try:
            return DataTable(str(path), datasets.Dataset.from_file(str(path)), _digest([path]))
        except Exception:  # noqa: BLE001 - Arrow's other format, of files and not of streams; read below
            pass
    load = partial(datasets.load_dataset, kind, data_files=str(path), split="train")
    return DataTable(str(path), _read(named, load), _digest([path]))


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
                lines = [_QUOTED.sub(b"", file.readline(MAX_LINE_BYTES)) for _ in range(2)]  # the second counts too
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


def _open_folder(folder: Path, choice: list[str], named: str) -> Any:
    """A split of a folder that `datasets` saved, or of one with Parquet, CSV or JSON files, as on the Hub."""
    import datasets

    split = choice[-1] if choice else None
    if (folder / _SAVED).is_file() or (folder / _SAVED_SPLITS).is_file():
        found = datasets.load_from_disk(str(folder))
    else:
        config = choice[0] if len(choice) > 1 else None
        found = datasets.load_dataset(str(folder), config)
    if isinstance(found, datasets.Dataset):
        require(split is None, f"{named} has no splits: leave :{split} out.")
        return found
    names = list(map(str, found))
    split = split or ("train" if "train" in names else names[0] if len(names) == 1 else None)
    require(split in names, f"{named} has the splits {', '.join(names)}: give {named.split()[-1]}:{names[0]}.")
    return found[split]


def _read(named: str, load: Callable[[], Any]) -> Any:
    """What `load` gives, without bars of progress. Raises ConfigurationError for whatever the libraries raise."""
    import datasets

    bars_were_on = datasets.is_progress_bar_enabled() if hasattr(datasets, "is_progress_bar_enabled") else True
    datasets.disable_progress_bars()
    try:
        return load()
    except ConfigurationError:
        raise
    except Exception as error:  # noqa: BLE001 - of datasets, pyarrow, pandas
        cause = error.__cause__ or error
        text = str(cause).strip().splitlines() or [""]
        raise ConfigurationError(f"{named} cannot be read: {type(cause).__name__}: {text[0][:300]}") from error
    finally:
        if bars_were_on:
            datasets.enable_progress_bars()


def _digest(paths: Iterable[Path]) -> int:
    crc = 0
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(_BLOCK_BYTES):
                crc = zlib.crc32(block, crc)
    return crc
