"""The folders of --save: drafts, atomic publication, and the tracker that names the newest checkpoint.

    latest_checkpointed_iteration.txt   the newest iteration, as Megatron writes it; always whole
    iter_0000050/                       a checkpoint; always whole, since it gets this name by a rename
    .iter_0000050.draft/                one that is being written, or was when its run was killed
    .iter_0000050.replaced/             an older one of the same iteration, until the tracker is written

Nothing here knows torch or ranks: one process calls it.
"""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

logger = logging.getLogger(__name__)

TRACKER = "latest_checkpointed_iteration.txt"
RECORD = "run_record.json"  # part of every checkpoint
ADAPTER_CONFIG = "adapter_config.json"  # where there are adapters, also beside the tracker


def iteration_folder(folder: Path, iteration: int) -> Path:
    """Megatron's name of a checkpoint under `folder`."""
    return folder / f"iter_{iteration:07d}"


def newest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint to go on from: `folder` itself if it is one, else what the tracker names, else the newest there.

    Returns:
        None if there is no checkpoint at all.
    """
    if (folder / RECORD).is_file():
        return folder
    tracked = _tracked_checkpoint(folder)
    if tracked is not None:
        return tracked
    whole = sorted(path.parent for path in folder.glob(f"iter_*/{RECORD}"))
    if not whole:
        return None
    logger.warning("%s does not name a checkpoint that is there: taking the newest, %s", folder / TRACKER, whole[-1])
    return whole[-1]


def _tracked_checkpoint(folder: Path) -> Path | None:
    tracker = folder / TRACKER
    text = tracker.read_text().strip() if tracker.is_file() else ""
    if not text.isdecimal():
        return None
    checkpoint = iteration_folder(folder, int(text))
    places = (checkpoint, _aside(checkpoint))  # killed between the two renames of `publish`, it is still aside
    return next((place for place in places if (place / RECORD).is_file()), None)


def start_draft(folder: Path, iteration: int) -> Path:
    """An empty folder to write a checkpoint into. Drafts that a killed run has left are removed."""
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(".iter_*.draft"):
        shutil.rmtree(left)
    draft = folder / f".{iteration_folder(folder, iteration).name}.draft"
    draft.mkdir()
    return draft


def publish(draft: Path, folder: Path, iteration: int) -> Path:
    """Make a written draft the newest checkpoint. Killed at any instant, the tracker names a whole checkpoint.

    Everything that needs space on the disk comes before the first rename.
    """
    for path in draft.iterdir():
        _sync(path)
    _sync(draft)
    tracker = write_beside(folder / TRACKER, f"{iteration}\n")
    checkpoint = iteration_folder(folder, iteration)
    aside = _aside(checkpoint)
    if checkpoint.exists():
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(checkpoint, aside)
    os.rename(draft, checkpoint)
    _sync(folder)
    os.replace(tracker, folder / TRACKER)
    _sync(folder)
    shutil.rmtree(aside, ignore_errors=True)
    return checkpoint


def write_atomically(path: Path, text: str) -> None:
    """Put `text` into `path` so that the file is the old one or the new one, never a part."""
    os.replace(write_beside(path, text), path)
    _sync(path.parent)


def write_beside(path: Path, text: str) -> Path:
    """A file on the disk with `text`, ready to replace `path`; none is left if it could not be written."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    return temporary


def _aside(checkpoint: Path) -> Path:
    return checkpoint.with_name(f".{checkpoint.name}.replaced")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
