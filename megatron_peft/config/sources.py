"""Where data, models and tokenizers come from: files and folders, or names of the Hugging Face Hub (`org/name`).

What the Hub has is taken from its cache, or downloaded once. Never code.
"""

import re
from collections.abc import Sequence
from functools import lru_cache
from math import inf
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
    numbers = [_number(path) for path in paths]
    if not any(number is not None for number in numbers):
        return Blend(list(paths), None)
    weights = [number for number in numbers[::2] if number is not None and 0 < number < inf]
    is_paired = 2 * len(weights) == len(paths) and not any(number is not None for number in numbers[1::2])
    given = " ".join([flag, *paths])
    require(is_paired, f"{given}: give paths only, or a weight before each path (0.3 A 0.7 B), above 0 and finite.")
    return Blend(list(paths[1::2]), weights)


def require_one_kind(paths: Sequence[str], flag: str) -> None:
    """Raises ConfigurationError for a malformed blend, and for records and indexed data in one blend."""
    prefixes, _ = parse_blend(paths, flag)
    indexed = [path for path in prefixes if kind_of_source(path) == "indexed"]
    missing = [path for path in indexed if not Path(f"{path}.idx").exists()]
    note = f" (no .idx: {', '.join(missing)}; {RECORD_NAMES})" if missing else ""
    require(
        len(indexed) in (0, len(prefixes)),
        f"{flag} mixes JSON files or tables with indexed datasets ({' '.join(paths)}): convert the JSON files with "
        f"megatron-peft data preprocess, or leave out {', '.join(indexed)}{note}.",
    )


def is_indexed(paths: Sequence[str]) -> bool:
    """Whether the paths, weights among them, name indexed data."""
    return any(kind_of_source(path) == "indexed" for path in paths if _number(path) is None)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


# Names of the Hub in place of folders.

TOKENIZER_FILES = ("*.json", "*.jinja", "*.txt", "*.model")
MODEL_FILES = (*TOKENIZER_FILES, "*.safetensors")
OLD_WEIGHTS = "pytorch_model*.bin"  # of a model without safetensors
DATA_FILES = ("README.md", "*.parquet", "*.csv", "*.arrow", "*.json", "*.jsonl", "*.jsonl.gz", "*.json.gz", "*.zst")
_SNAPSHOT = re.compile(r"(?:models|datasets)--([^/]+)--([^/]+)/snapshots/[^/]+/?$")
Repository = Literal["model", "dataset"]


def is_hub_name(name: str) -> bool:
    """Whether it is `org/name`, and nothing that exists here: a local folder of this name wins."""
    return HUB_NAME.fullmatch(name) is not None and not name.endswith(".model") and not Path(name).exists()


def hub_name(folder: str | Path) -> str | None:
    """`org/name` of a folder in the Hub's cache, or None."""
    match = _SNAPSHOT.search(str(folder))
    return f"{match[1]}/{match[2]}" if match else None


def not_a_folder(name: str, flag: str) -> str:
    """Return the message for the name of a model that is neither a folder nor a name of the Hub."""
    hub = "a model of the Hugging Face Hub is named ORG/NAME, as in meta-llama/Llama-3.1-8B"
    hint = hub if re.fullmatch(r"[\w.-]+", name) else "give the folder of a downloaded model, or ORG/NAME of the Hub"
    return f"{flag} {name} is not a folder: {hint}."


def local_model(name: str, flag: str) -> str:
    """The folder with config.json, tokenizer and weights: `name` itself, unless it is one of the Hub's.

    Raises ConfigurationError if the Hub or its cache does not have it.
    """
    if not is_hub_name(name):
        return name
    folder = local_folder(name, flag, MODEL_FILES)
    if not any(Path(folder).glob("*.safetensors")):
        folder = local_folder(name, flag, (*TOKENIZER_FILES, OLD_WEIGHTS))
    has_weights = any(any(Path(folder).glob(pattern)) for pattern in ("*.safetensors", OLD_WEIGHTS))
    require(has_weights, f"{flag} {name}: its folder {folder} in the cache has no weights: hf download {name}")
    return folder


def local_tokenizer(name: str, flag: str) -> str:
    """The folder with the files of a tokenizer; see `local_model`."""
    return local_folder(name, flag, TOKENIZER_FILES) if is_hub_name(name) else name


@lru_cache
def local_folder(name: str, flag: str, patterns: Sequence[str], repository: Repository = "model") -> str:
    """Return the directory of the Hub's cache with those files of `name` that match; download what is missing.

    Processes that ask at once wait for one another at each file (huggingface_hub's own locks).
    Raises ConfigurationError if it is neither there nor can be had.
    """
    from huggingface_hub import constants, snapshot_download

    try:
        return snapshot_download(name, repo_type=repository, allow_patterns=list(patterns))
    except Exception as error:  # noqa: BLE001 - of the network, of the Hub, of its cache
        said = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        is_offline = constants.HF_HUB_OFFLINE
        why = "HF_HUB_OFFLINE is set" if is_offline else f"the Hub did not give it ({type(error).__name__}: {said})"
        is_data = repository == "dataset"
        known = f"no file or folder here and no prefix of an .idx ({RECORD_NAMES})" if is_data else "no folder here"
        kind = " --repo-type dataset" if is_data else ""
        raise ConfigurationError(
            f"{flag} {name} is {known}, the cache of the Hugging Face Hub ({constants.HF_HUB_CACHE}) does not have it, "
            f"and {why}. Where there is a network: hf download {name}{kind} (a private or gated one needs hf auth "
            f"login first)."
        ) from error
