"""The folders of --save: drafts, atomic publication, and the tracker that names the newest checkpoint.

    latest_checkpointed_iteration.txt   the newest iteration, as Megatron writes it; always whole
    iter_0000050/                       a checkpoint; always whole, since it gets this name by a rename
    .iter_0000050.1f0e2d3c.draft/       one that is being written, or was when its run was killed
    .iter_0000050.replaced/             an older one of the same iteration, until the tracker is written
    .iter_0000040.removed/              one that --keep-last-checkpoints is taking away

Nothing here knows torch or ranks: one process calls it.
"""

import logging
import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path

from megatron_peft.checkpoint.manifest import MANIFEST, FileSum, write_manifest

logger = logging.getLogger(__name__)

TRACKER = "latest_checkpointed_iteration.txt"
RECORD = "run_record.json"  # part of every checkpoint
MOST_DIGITS = 18  # of an iteration
_NAME = "iter_{:07d}"


def iteration_folder(folder: Path, iteration: int) -> Path:
    """Megatron's name of a checkpoint under `folder`."""
    return folder / _NAME.format(iteration)


def is_checkpoint(path: Path) -> bool:
    """Whether it is one of ours, be it damaged: a single lost file leaves the record or the manifest."""
    return (path / RECORD).is_file() or (path / MANIFEST).is_file()


def checkpoints(folder: Path) -> list[Path]:
    """Where to go on from, best first: `folder` itself if it is one, else what the tracker names, then the newest."""
    if is_checkpoint(folder):
        return [folder]
    tracked = _tracked_checkpoint(folder)
    others = [path for path in _iterations(folder) if path != tracked]
    if tracked is not None:
        return [tracked, *others]
    if others:
        logger.warning("%s does not name a checkpoint that is there: the newest is %s", folder / TRACKER, others[0])
    return others


def newest_checkpoint(folder: Path) -> Path | None:
    """The first of `checkpoints`; None if there is none. Its files are not checked."""
    return next(iter(checkpoints(folder)), None)


def _iterations(folder: Path) -> list[Path]:
    return sorted(filter(is_checkpoint, folder.glob("iter_*")), reverse=True)


def _tracked_checkpoint(folder: Path) -> Path | None:
    tracker = folder / TRACKER
    text = tracker.read_text(errors="replace").strip() if tracker.is_file() else ""
    if not (text.isascii() and text.isdecimal() and len(text) <= MOST_DIGITS):
        return None
    checkpoint = iteration_folder(folder, int(text))
    places = (checkpoint, _aside(checkpoint))  # killed between the two renames of `publish`, it is still aside
    return next(filter(is_checkpoint, places), None)


def start_draft(folder: Path, iteration: int) -> Path:
    """An empty folder to write a checkpoint into. No other process, not even one left by a killed run, has its name."""
    folder.mkdir(parents=True, exist_ok=True)
    name = iteration_folder(folder, iteration).name
    draft = folder / f".{name}.{secrets.token_hex(4)}.draft"
    draft.mkdir()
    return draft


def remove_leftovers(folder: Path) -> None:
    """Clear away what a killed run has left; only for the holder of the folder's lock. Nothing whole is lost."""
    for pattern in (".iter_*.draft", ".iter_*.removed"):
        for left in folder.glob(pattern):
            shutil.rmtree(left, ignore_errors=True)
    for aside in folder.glob(".iter_*.replaced"):
        checkpoint = folder / aside.name[1:].removesuffix(".replaced")
        if is_checkpoint(checkpoint):
            shutil.rmtree(aside, ignore_errors=True)
        else:
            os.rename(aside, checkpoint)


def publish(draft: Path, folder: Path, iteration: int, known: Mapping[str, FileSum] | None = None) -> Path:
    """Make a written draft the newest checkpoint. Killed at any instant, the tracker names a whole checkpoint.

    Everything that needs space on the disk comes before the first rename.

    Args:
        known: sums of files that need not be read for the manifest, by name.
    """
    write_manifest(draft, known or {})
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


def keep_last(folder: Path, iteration: int, num_kept: int) -> None:
    """Remove all but the last `num_kept` checkpoints up to `iteration`, which was just published.

    Later ones, of a run that was started again further back, are left alone. What cannot be removed is said.
    """
    newest = iteration_folder(folder, iteration)
    for path in [path for path in _iterations(folder) if path.name < newest.name][num_kept - 1 :]:
        removed = path.with_name(f".{path.name}.removed")
        try:
            os.rename(path, removed)  # first, so that no half of one keeps the name of a whole one
            shutil.rmtree(removed)
        except OSError as error:
            logger.warning("%s cannot be removed: %s", path, error)


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
