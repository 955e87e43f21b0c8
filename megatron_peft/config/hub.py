"""Names of the Hugging Face Hub (`org/name`) in place of folders: from its cache, or downloaded once. Never code."""

import os
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Literal

from megatron_peft.config.errors import ConfigurationError, require
from megatron_peft.config.sources import HUB_NAME, RECORD_NAMES

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
    require(has_weights, f"{flag} {name}: its folder {folder} in the cache has no weights. {_way_out(name, 'model')}")
    return folder


def local_tokenizer(name: str, flag: str) -> str:
    """The folder with the files of a tokenizer; see `local_model`."""
    return local_folder(name, flag, TOKENIZER_FILES) if is_hub_name(name) else name


@lru_cache
def local_folder(name: str, flag: str, patterns: Sequence[str], repository: Repository = "model") -> str:
    """The folder of the Hub's cache with those files of `name` that match; what is missing is downloaded.

    Raises ConfigurationError if it is neither there nor can be had.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    if os.environ.get("LOCAL_RANK", "0") != "0":
        disable_progress_bars()
    offline = bool(constants.HF_HUB_OFFLINE)
    try:
        return snapshot_download(name, repo_type=repository, allow_patterns=list(patterns), local_files_only=offline)
    except Exception as error:  # noqa: BLE001 - of the network, of the Hub, of its cache
        said = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        why = "HF_HUB_OFFLINE is set" if offline else f"the Hub did not give it ({type(error).__name__}: {said})"
        is_data = repository == "dataset"
        known = f"no file or folder here and no prefix of an .idx ({RECORD_NAMES})" if is_data else "no folder here"
        raise ConfigurationError(
            f"{flag} {name} is {known}, the cache of the Hugging Face Hub ({constants.HF_HUB_CACHE}) does not have it, "
            f"and {why}. {_way_out(name, repository)}"
        ) from error


def _way_out(name: str, repository: Repository) -> str:
    kind = " --repo-type dataset" if repository == "dataset" else ""
    return f"Where there is a network: hf download {name}{kind} (a private or gated one needs hf auth login first)."
