"""What a path of training data names: records in JSON or a table, Megatron's indexed data, or a dataset of the Hub."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from megatron_peft.config.errors import ConfigurationError, require

JSON_SUFFIXES = (".json", ".jsonl")
TABLE_SUFFIXES = (".parquet", ".csv", ".arrow")
RECORD_NAMES = f"names of files of records end in {', '.join((*JSON_SUFFIXES, *TABLE_SUFFIXES))}"  # for messages
_NO_HUB_NAMES = (".txt", ".tsv", ".gz", ".zst", ".zip", ".xlsx")  # endings of files, though nothing here reads them
SourceKind = Literal["json", "table", "hub", "indexed"]
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_DATA = re.compile(rf"{HUB_NAME.pattern}(:[\w.-]+){{0,2}}")


def kind_of_source(path: str) -> SourceKind:
    """What a path names, by its ending. Without one, a path with an .idx or .bin is the prefix of indexed data, a
    folder (or FOLDER:SPLIT) is a table that was saved by `datasets`, and `org/name[:split]` is a dataset of the Hub,
    unless it is a file."""
    if path.endswith(JSON_SUFFIXES):
        return "json"
    if path.endswith(TABLE_SUFFIXES):
        return "table"
    if any(Path(path + suffix).exists() for suffix in (".idx", ".bin")):
        return "indexed"  # megatron-core may have put a folder of this name beside it
    if Path(path).is_dir() or Path(path.partition(":")[0]).is_dir():
        return "table"
    is_file = path.endswith(_NO_HUB_NAMES) or Path(path).is_file()
    return "hub" if _HUB_DATA.fullmatch(path) and not is_file else "indexed"


class Blend(NamedTuple):
    """What megatron-core calls a blend; `weights` is None where only paths were given."""

    prefixes: list[str]
    weights: list[float] | None


def parse_blend(paths: Sequence[str], flag: str) -> Blend:
    """`p q` or `0.3 p 0.7 q`. Raises ConfigurationError for another mixture, and for a weight that is not above 0."""
    given = " ".join([flag, *paths])
    weights = [_number(path) for path in paths]
    weighted = any(weight is not None for weight in weights)
    pairs = len(paths) % 2 == 0 and all((weight is None) == bool(i % 2) for i, weight in enumerate(weights))
    require(not weighted or pairs, f"{given}: give paths only, or a weight before each path (0.3 A 0.7 B).")
    chosen = [weight for weight in weights if weight is not None]
    require(all(0 < weight < float("inf") for weight in chosen), f"{given}: weights must be above 0, and finite.")
    return Blend(list(paths[1::2] if weighted else paths), chosen or None)


def require_one_kind(paths: Sequence[str], flag: str) -> None:
    """Raises ConfigurationError for a malformed blend, and for records and indexed data in one blend."""
    prefixes, _ = parse_blend(paths, flag)
    indexed = [path for path in prefixes if kind_of_source(path) == "indexed"]
    if len(indexed) in (0, len(prefixes)):
        return
    missing = [path for path in indexed if not Path(f"{path}.idx").exists()]
    note = f" (no .idx: {', '.join(missing)}; {RECORD_NAMES})" if missing else ""
    raise ConfigurationError(
        f"{flag} mixes JSON files or tables with indexed datasets ({' '.join(paths)}): convert the JSON files with "
        f"megatron-peft data preprocess, or leave out {', '.join(indexed)}{note}."
    )


def is_indexed(paths: Sequence[str]) -> bool:
    """Whether the paths, weights among them, name indexed data."""
    return any(kind_of_source(path) == "indexed" for path in paths if _number(path) is None)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
