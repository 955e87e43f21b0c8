"""Where the files of a model in Megatron's form lie: a distributed checkpoint, or old files of ranks.

FOLDER/.metadata                                 what hf-to-megatron wrote, or an iteration of a run
FOLDER/iter_0000050/.metadata                    named by FOLDER/latest_checkpointed_iteration.txt
FOLDER/release/mp_rank_00/model_optim_rng.pt     old files, below any of these
"""

import re
from collections.abc import Iterator
from pathlib import Path

from megatron_peft.checkpoint.folders import MOST_DIGITS, TRACKER, iteration_folder, newest_checkpoint

INDEX = ".metadata"
RANK_FOLDER = re.compile(r"mp_rank_(\d{2})(?:_(\d{3}))?")
RANK_FILES = ("model_optim_rng.pt", "model_rng.pt")


def megatron_files(folder: str | Path) -> Path | None:
    """Where Megatron's files lie: `folder` itself, or the checkpoint in it that its tracker names. None: nowhere."""
    return next((place for place in _places(Path(folder)) if (place / INDEX).is_file() or holds_ranks(place)), None)


def holds_ranks(folder: Path) -> bool:
    """Whether there are folders of ranks in it."""
    return any(RANK_FOLDER.match(path.name) for path in folder.glob("mp_rank_*"))


def _places(folder: Path) -> Iterator[Path]:
    yield folder
    ours = newest_checkpoint(folder) if folder.is_dir() else None
    if ours is not None:
        yield ours
    tracker = folder / TRACKER
    text = tracker.read_text(errors="replace").strip() if tracker.is_file() else ""
    if text:
        is_number = text.isdecimal() and len(text) <= MOST_DIGITS
        yield iteration_folder(folder, int(text)) if is_number else folder / "release"
