"""The folders of --save: publication, manifest, lock; and where a model in Megatron's form lies."""

import fcntl
import json
import logging
import os
import re
import secrets
import shutil
import socket
import stat
import time
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from megatron_peft.config import ConfigurationError, require
from megatron_peft.config.untrusted import parse_json, read_text, require_regular

# The manifest of a checkpoint: size and checksum of every file, so that a torn or changed one is found and named.
#
#     manifest.json   {"format_version": 1, "files": {"__0_0.distcp": {"size": 12345, "crc32": "89abcdef"}, ...},
#                      "crc32_of_files": "01234567"}
#
# CRC-32 finds every change within any 32 bits in a row, hence every flipped byte; it guards against accidents, not
# against somebody who means harm. The manifest guards itself: its text must be exactly what its contents are written
# as, and it holds the checksum of its list.

MANIFEST = "manifest.json"
FORMAT_VERSION = 1
_CHUNK_BYTES = 4 * 1024 * 1024


class FileSum(NamedTuple):
    """What a file is recognised by: its size in bytes and the CRC-32 of all of them, as eight hexadecimal digits."""

    size: int
    crc32: str


def measure(path: Path) -> FileSum:
    """Read a file whole. Raises OSError if it cannot be read."""
    size, crc = 0, 0
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            size, crc = size + len(chunk), zlib.crc32(chunk, crc)
    return FileSum(size, f"{crc:08x}")


def write_manifest(folder: Path, known: Mapping[str, FileSum]) -> None:
    """List all files of `folder`. Those that are `known` (by name; their writers measured them) are not read again."""
    paths = (path for path in sorted(folder.iterdir()) if path.name != MANIFEST)
    files = {path.name: known.get(path.name) or measure(path) for path in paths}
    (folder / MANIFEST).write_text(_text(files))


def read_manifest(folder: Path) -> dict[str, FileSum]:
    """{file name: sum}. Raises ConfigurationError if it cannot be read, ValueError if it is not as it was written."""
    text = read_text(folder / MANIFEST)
    try:
        files = {
            name: FileSum(entry["size"], entry["crc32"]) for name, entry in parse_json(text, MANIFEST)["files"].items()
        }
    except (ConfigurationError, AttributeError, KeyError, TypeError) as error:
        raise ValueError("it is no manifest") from error
    odd = [name for name, (size, _) in files.items() if type(size) is not int or size < 0 or name != Path(name).name]
    if odd:
        raise ValueError(f"it lists {odd[0]!r}, which is no file of that folder, or has no size")
    if text != _text(files):
        raise ValueError("it is not as it was written")
    return files


def damage(checkpoint: Path, share: int = 0, num_shares: int = 1) -> list[str]:
    """What is wrong with a checkpoint's files, each named; empty if all of them are whole.

    Args:
        checkpoint: an iteration's folder.
        share, num_shares: of the files, the largest dealt out first: each rank checks its own share.
    """
    try:
        files = read_manifest(checkpoint)
    except ConfigurationError as error:  # it names the file
        return [str(error).removeprefix(f"{checkpoint}/").removesuffix(".")]
    except ValueError as error:
        return [f"{MANIFEST} cannot be read: {error}"]
    by_size = sorted(files, key=lambda name: (-files[name].size, name))
    problems = (_damage_of(checkpoint / name, files[name]) for name in by_size[share::num_shares])
    return [problem for problem in problems if problem]


def _damage_of(path: Path, expected: FileSum) -> str:
    try:
        size = path.stat().st_size
        require_regular(path)
        if size != expected.size:
            return f"{path.name} has {size} bytes instead of {expected.size}"
        found = measure(path)
    except FileNotFoundError:
        return f"{path.name} is missing"
    except (OSError, ConfigurationError) as error:
        return f"{path.name} cannot be read: {error}"
    return "" if found == expected else f"{path.name} has other bytes than were written"


def _text(files: Mapping[str, FileSum]) -> str:
    listed = {name: entry._asdict() for name, entry in sorted(files.items())}
    crc = zlib.crc32(json.dumps(listed).encode())
    return json.dumps({"format_version": FORMAT_VERSION, "files": listed, "crc32_of_files": f"{crc:08x}"}, indent=1)


# The folders of --save: drafts, atomic publication, and the tracker that names the newest checkpoint.
#
#     latest_checkpointed_iteration.txt   the newest iteration, as Megatron writes it; always whole
#     iter_0000050/                       a checkpoint; always whole, since it gets this name by a rename
#     .iter_0000050.1f0e2d3c.draft/       one that is being written, or was when its run was killed
#     .iter_0000050.replaced/             an older one of the same iteration, until the tracker is written
#     .iter_0000040.removed/              one that --keep-last-checkpoints is taking away
#
# Nothing here knows torch or ranks: one process calls it.

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
        sync(path)
    sync(draft)
    tracker = write_beside(folder / TRACKER, f"{iteration}\n")
    checkpoint = iteration_folder(folder, iteration)
    aside = _aside(checkpoint)
    if checkpoint.exists():
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(checkpoint, aside)
    os.rename(draft, checkpoint)
    sync(folder)
    os.replace(tracker, folder / TRACKER)
    sync(folder)
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
    sync(path.parent)


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


def sync(path: Path) -> None:
    """Onto the disk: a file's bytes, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# One writer for each --save folder: a lock that ends with its process, however that ends.
#
# It is the kernel's lock of a byte range (`fcntl`), owned by the process: kill -9 gives it up, forked workers of the
# data do not inherit it, and network file systems know it. The file's text tells people who holds it; nothing relies
# on it.

LOCK = ".lock"
GRACE_SECONDS = 3.0  # a process that was just killed takes a moment to be gone


class FolderLock:
    """Held from its making until `release`.

    Attributes:
        is_held: False where the file system knows no locks; a warning has said so.

    Raises:
        ConfigurationError: another process holds it, and still does after `grace_seconds`.
        OSError: the lock's file cannot be made.
    """

    def __init__(self, folder: Path, grace_seconds: float = GRACE_SECONDS) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        self._opened_folder = os.open(folder, os.O_RDONLY)  # while it is open, no new folder gets its inode
        try:
            require(
                stat.S_ISREG(os.fstat(self._descriptor).st_mode),
                f"--save {folder}: {LOCK} in it is a pipe or a device, not a file: remove it.",
            )
            self.is_held = self._acquire(time.monotonic() + grace_seconds)
        except ConfigurationError:
            self.release()
            raise
        if self.is_held:
            self._say_who()

    @property
    def is_in_place(self) -> bool:
        """Whether the folder's lock is this one; not if somebody has moved or removed the folder."""
        return _is_at(self._descriptor, self._folder / LOCK)

    @property
    def is_of_the_same_folder(self) -> bool:
        """Whether the folder that it was taken for is still there, be it without the lock's file."""
        return _is_at(self._opened_folder, self._folder)

    def release(self) -> None:
        """The file stays: taking it away could take it from the next process."""
        os.close(self._descriptor)
        os.close(self._opened_folder)

    def _acquire(self, deadline: float) -> bool:
        while True:
            try:
                fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except (BlockingIOError, PermissionError):
                self._refuse_after(deadline)
                time.sleep(0.1)
            except OSError as error:
                logger.warning("%s cannot be locked (%s): see to it that one run only saves there", self._folder, error)
                return False

    def _refuse_after(self, deadline: float) -> None:
        if time.monotonic() >= deadline:
            holder = os.pread(self._descriptor, 1000, 0).decode(errors="replace").strip()
            raise ConfigurationError(
                f"--save {self._folder}: another run is saving there ({holder or 'unknown'}): "
                f"wait for its end, stop it, or give another --save."
            )

    def _say_who(self) -> None:
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, f"process {os.getpid()} on {socket.gethostname()} since {since}\n".encode(), 0)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


# Where the files of a model in Megatron's form lie: a distributed checkpoint, or old files of ranks.
#
# FOLDER/.metadata                                 what hf-to-megatron wrote, or an iteration of a run
# FOLDER/iter_0000050/.metadata                    named by FOLDER/latest_checkpointed_iteration.txt
# FOLDER/release/mp_rank_00/model_optim_rng.pt     old files, below any of these

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
