"""Folders that appear whole; the --save folder with manifest, publication and lock; a Megatron checkpoint's files."""

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
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from megatron_peft.config import ConfigurationError, require, writing
from megatron_peft.config.untrusted import parse_json, read_text, require_regular

# The manifest of a checkpoint, which finds and names torn or changed files:
#
#     manifest.json   {"format_version": 1, "files": {"__0_0.distcp": {"size": 12345, "crc32": "89abcdef"}, ...},
#                      "crc32_of_files": "01234567"}
#
# CRC-32 finds every flipped byte. It protects against accidents, not against an attacker.

MANIFEST = "manifest.json"
RANK_OF_FILE = re.compile(r"__(\d{1,6})_")
FORMAT_VERSION = 1
_CHUNK_BYTES = 4 * 1024 * 1024


class FileSum(NamedTuple):
    """A file's size in bytes and the CRC-32 of its contents, as eight hexadecimal digits."""

    size: int
    crc32: str


def measure(path: Path) -> FileSum:
    """Size and checksum of a file, which is read whole. Raises OSError if it cannot be read."""
    size, crc = 0, 0
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            size, crc = size + len(chunk), zlib.crc32(chunk, crc)
    return FileSum(size, f"{crc:08x}")


def write_manifest(folder: Path, known: Mapping[str, FileSum]) -> None:
    """Write the manifest of `folder`. `known` (by name): files measured by their writers, which are not read again."""
    paths = (path for path in _written(folder) if path.name != MANIFEST)
    files = {path.name: known.get(path.name) or measure(path) for path in paths}
    (folder / MANIFEST).write_text(_manifest_text(files))


def _written(folder: Path) -> list[Path]:
    """The files of a folder without its lock, which ends when its process closes any descriptor of that file."""
    return sorted(path for path in folder.iterdir() if path.name != LOCK)


def read_manifest(folder: Path) -> dict[str, FileSum]:
    """{file name: sum}. Raises ConfigurationError if the manifest cannot be read, ValueError if it is damaged."""
    text = read_text(folder / MANIFEST)
    try:
        files = {
            name: FileSum(entry["size"], entry["crc32"]) for name, entry in parse_json(text, MANIFEST)["files"].items()
        }
    except (ConfigurationError, AttributeError, KeyError, TypeError) as error:
        raise ValueError("not a manifest") from error
    odd = [name for name, (size, _) in files.items() if type(size) is not int or size < 0 or name != Path(name).name]
    if odd:
        raise ValueError(f"its entry {odd[0]!r} is not a file name with a size")
    if text != _manifest_text(files):  # the manifest protects itself: same contents, same text, same checksum
        raise ValueError("its text and its checksum do not match")
    return files


def damage(checkpoint: Path, share: int = 0, num_shares: int = 1, without: str = "") -> list[str]:
    """What is wrong with a checkpoint's files (of which a rank checks its share), by name; empty if all are whole.

    A rank checks the files of a rank of its number, most of which it reads again to resume: from memory.
    without: part of the names of files that are not looked at.
    """
    try:
        files = read_manifest(checkpoint)
    except ConfigurationError as error:
        return [str(error).removeprefix(f"{checkpoint}/").removesuffix(".")]
    except ValueError as error:
        return [f"{MANIFEST} cannot be read: {error}"]
    read = [name for name in files if not (without and without in name)]
    by_size = sorted(read, key=lambda name: (-files[name].size, name))  # those of no rank are dealt out
    number_of = {name: number for number, name in enumerate(by_size)}
    number_of |= {name: int(rank[1]) for name in by_size if (rank := RANK_OF_FILE.match(name))}
    mine = [name for name in by_size if number_of[name] % num_shares == share]
    problems = (_damage_of(checkpoint / name, files[name]) for name in mine)
    return [problem for problem in problems if problem]


def _damage_of(path: Path, expected: FileSum) -> str:
    try:
        size = path.stat().st_size
        require_regular(path)
        if size != expected.size:
            return f"{path.name} has {size} bytes instead of {expected.size}"
        measured = measure(path)
    except FileNotFoundError:
        return f"{path.name} is missing"
    except (OSError, ConfigurationError) as error:
        return f"{path.name} cannot be read: {error}"
    return "" if measured == expected else f"{path.name} does not match its checksum"


def _manifest_text(files: Mapping[str, FileSum]) -> str:
    listed = {name: entry._asdict() for name, entry in sorted(files.items())}
    crc = zlib.crc32(json.dumps(listed).encode())
    return json.dumps({"format_version": FORMAT_VERSION, "files": listed, "crc32_of_files": f"{crc:08x}"}, indent=1)


# A --save folder, which one process writes:
#
#     latest_checkpointed_iteration.txt   the tracker: the newest iteration, as Megatron writes it; always whole
#     iter_0000050/                       a checkpoint; always whole, since it gets this name by a rename
#     .iter_0000050.1f0e2d3c.draft/       being written, or left by a killed run
#     .iter_0000050.replaced/             an older checkpoint of the same iteration, until the tracker is written
#     .iter_0000040.removed/              being deleted by --keep-last-checkpoints
#     best -> iter_0000030                a link to the checkpoint with the lowest validation loss (--keep-best)

logger = logging.getLogger(__name__)

TRACKER = "latest_checkpointed_iteration.txt"
RECORD = "run_record.json"  # part of every checkpoint
OPTIMIZER_FILE = "_optimizer_"  # in the names of tensor files that only a resumed run needs
BEST = "best"
MOST_DIGITS = 18  # of an iteration


def iteration_folder(folder: Path, iteration: int) -> Path:
    """Megatron's name of a checkpoint under `folder`."""
    return folder / f"iter_{iteration:07d}"


def is_checkpoint(path: Path) -> bool:
    """Whether it is one of our checkpoints, even if a file is lost: the record or the manifest is still there."""
    return (path / RECORD).is_file() or (path / MANIFEST).is_file()


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoints to resume from, best first: `folder` itself if it is one, else the tracker's, then the newest."""
    if is_checkpoint(folder):
        return [folder]
    named = _named_by_tracker(folder)
    # After a kill between the two renames of `publish` it is still aside.
    places = (named, _aside(named)) if named and named.name != "release" else ()
    tracked = [path for path in places if is_checkpoint(path)][:1]
    others = [path for path in _iterations(folder) if path not in tracked]
    if tracked:
        return tracked + others
    if others:
        logger.warning("%s does not name a checkpoint that is there: the newest is %s", folder / TRACKER, others[0])
    return others


def newest_checkpoint(folder: Path) -> Path | None:
    """The first of `checkpoints`, or None. Its files are not checked."""
    return next(iter(checkpoints(folder)), None)


def _iterations(folder: Path) -> list[Path]:
    """Those that a run has written, the newest first: not what a user has put aside, as iter_0000020_keep."""
    written = (path for path in folder.glob("iter_*") if path.name.removeprefix("iter_").isdecimal())
    return sorted(filter(is_checkpoint, written), reverse=True)


def tracker_text(folder: Path) -> str:
    """Contents of the tracker; empty if there is none."""
    tracker = folder / TRACKER
    return tracker.read_text(errors="replace").strip() if tracker.is_file() else ""


def _named_by_tracker(folder: Path) -> Path | None:
    """An iteration's folder, or `release` where the tracker holds no number; None without a tracker."""
    text = tracker_text(folder)
    is_number = text.isascii() and text.isdecimal() and len(text) <= MOST_DIGITS
    return iteration_folder(folder, int(text)) if is_number else folder / "release" if text else None


def remove_leftovers(folder: Path) -> None:
    """Clean up after a killed run, keeping complete checkpoints. The caller must hold the folder's lock."""
    for pattern in (".iter_*.draft", ".iter_*.removed"):
        for left in folder.glob(pattern):
            shutil.rmtree(left, ignore_errors=True)
    for aside in folder.glob(".iter_*.replaced"):
        checkpoint = folder / aside.name[1:].removesuffix(".replaced")
        if is_checkpoint(checkpoint):
            shutil.rmtree(aside, ignore_errors=True)
        else:  # the run was killed between the two renames of `publish`
            os.rename(aside, checkpoint)


def publish(draft: Path, folder: Path, iteration: int, known: Mapping[str, FileSum] | None = None) -> Path:
    """Make a written draft the newest checkpoint. If the process is killed, the tracker names a whole checkpoint."""
    # Everything that needs disk space comes first: on a full disk nothing has been renamed yet.
    write_manifest(draft, known or {})
    # A rename may reach the disk before the contents of the files, so those are synced first.
    sync_folder(draft, known or {})
    tracker = write_beside(folder / TRACKER, f"{iteration}\n")
    # Killed up to here: an ignored draft is left, and the tracker names the previous checkpoint.
    checkpoint = iteration_folder(folder, iteration)
    aside = _aside(checkpoint)
    if checkpoint.exists():  # a run that went back saves this iteration again; a folder cannot be replaced by a rename
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(checkpoint, aside)
        # Killed here: the tracker may name this iteration, and readers find the old checkpoint aside.
    # Killed between this rename and the tracker's: both checkpoints are whole, the tracker names the previous one.
    os.rename(draft, checkpoint)
    sync(folder)
    os.replace(tracker, folder / TRACKER)
    sync(folder)
    # Only now is the old checkpoint of this iteration no longer needed.
    shutil.rmtree(aside, ignore_errors=True)
    return checkpoint


def link_best(folder: Path, iteration: int) -> None:
    """Make the link `best` name the checkpoint of `iteration`. A crash leaves the old link or the new one.

    Does nothing if there is no such checkpoint. Failures are logged.
    """
    name, link = iteration_folder(folder, iteration).name, folder / BEST
    if not is_checkpoint(folder / name) or _linked_name(link) == name:
        return
    temporary = folder / f".{BEST}.tmp"
    try:
        temporary.unlink(missing_ok=True)
        os.symlink(name, temporary)
        os.replace(temporary, link)
        sync(folder)
    except OSError as error:
        logger.warning("%s cannot be made a link to %s (%s): load that checkpoint by its name", link, name, error)


def best_checkpoint(folder: Path, iteration: int) -> Path | None:
    """The checkpoint of `iteration` in a --save folder (or in that of a checkpoint), as `best` if that is its name."""
    folder = folder.parent if is_checkpoint(folder) else folder
    checkpoint, link = iteration_folder(folder, iteration), folder / BEST
    return None if not is_checkpoint(checkpoint) else link if _linked_name(link) == checkpoint.name else checkpoint


def _linked_name(link: Path) -> str:
    """The name that a link holds; empty if there is no link."""
    return os.readlink(link) if link.is_symlink() else ""


def keep_last(folder: Path, iteration: int, num_kept: int, best: int | None = None) -> None:
    """Remove all but the last `num_kept` checkpoints up to `iteration`, which was published. May run in any thread.

    The one of iteration `best` is kept, and what the link `best` names. Checkpoints of later iterations are kept: the
    run was resumed from an earlier one. Failures are logged.
    """
    newest = iteration_folder(folder, iteration)
    kept = {_linked_name(folder / BEST), iteration_folder(folder, best).name if best is not None else ""}
    older = [path for path in _iterations(folder) if path.name < newest.name]
    for path in (path for path in older[num_kept - 1 :] if path.name not in kept):
        removed = path.with_name(f".{path.name}.removed")
        try:
            os.rename(path, removed)  # first, so that a half-deleted folder never has a checkpoint's name
            shutil.rmtree(removed)
        except OSError as error:
            logger.warning("%s cannot be removed: %s", path, error)


def write_atomically(path: Path, content: str | bytes | Iterable[bytes]) -> None:
    """Write text, bytes or lines to `path`; a crash leaves the old file or the new one."""
    os.replace(write_beside(path, content), path)
    sync(path.parent)


def write_beside(path: Path, content: str | bytes | Iterable[bytes]) -> Path:
    """Write and sync a temporary file, ready to replace `path`. No file is left if that fails."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.unlink(missing_ok=True)  # of a killed process, or a link that leads elsewhere
        with open(temporary, "xb") as file:
            content = content.encode() if isinstance(content, str) else content
            file.writelines([content] if isinstance(content, bytes) else content)
            file.flush()
            os.fsync(file.fileno())
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):  # a full disk is told without a name
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    return temporary


def _aside(checkpoint: Path) -> Path:
    return checkpoint.with_name(f".{checkpoint.name}.replaced")


def sync(path: Path) -> None:
    """Flush to disk: the contents of a file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path, synced: Container[str] = ()) -> None:
    """Flush the contents of all files in a folder to disk, but those that their writers have synced; and all names."""
    for path in (*(path for path in _written(folder) if path.name not in synced), folder):
        sync(path)


def start_draft(place: Path) -> Path:
    """Make an empty folder beside `place`, which then appears whole. No rank of a killed run knows its random name."""
    place.parent.mkdir(parents=True, exist_ok=True)
    draft = place.parent / f".{place.name}.{secrets.token_hex(4)}.draft"
    draft.mkdir()
    return draft


def publish_draft(draft: Path, place: Path, synced: Container[str] = ()) -> None:
    """Give a written draft its name, when all of it is on the disk. OSError: a folder with files has this name."""
    sync_folder(draft, synced)
    draft.rename(place)
    sync(place.parent)


def check_new(output: str | Path) -> None:
    """Raise ConfigurationError if `output` exists: nothing is ever overwritten."""
    require(not os.path.lexists(output), f"--output {output} exists already: remove it, or give another --output.")


@contextmanager
def new_folder(output: str | Path) -> Iterator[Path]:
    """The draft of `output`: published at the end, and removed on any error.

    Raises ConfigurationError: `output` exists, its parent cannot be written, or the disk is full.
    """
    check_new(output)
    way_out = "the partial output was removed. Free disk space there, or give another --output"
    with writing(f"--output {output}", way_out, "could not be written"), ExitStack() as stack:
        draft = start_draft(Path(output))
        stack.callback(shutil.rmtree, draft, ignore_errors=True)  # does not exist any more if all went well
        yield draft
        check_new(output)
        publish_draft(draft, Path(output))


def require_own(folder: Path, load: str | None, finetune: bool = False) -> None:
    """Check that --save belongs to the run: it has no checkpoints, or --load resumes them.

    Raises:
        ConfigurationError: A new run would replace the checkpoints and metrics of another one.
    """
    loads = Path(load).resolve() if load and not finetune else None
    goes_on = loads and folder.resolve() == (loads.parent if is_checkpoint(loads) else loads)
    newest = newest_checkpoint(folder)
    existing = newest.name if newest else f"{TRACKER} names one" * (folder / TRACKER).is_file()
    require(
        goes_on or not existing,
        f"--save {folder} already holds the checkpoints of a run (the newest: {existing}), which a new run "
        f"would replace: give another --save; or, to resume that run, --load {folder}"
        + (" without --finetune." if finetune and load else "."),
    )


LOCK = ".lock"
GRACE_SECONDS = 3.0  # a killed process takes a moment to exit


class FolderLock:
    """One writer for each --save folder: an `fcntl` lock, from construction until `release` or the process's end.

    Such a lock ends with kill -9, is not inherited by forked data workers, and works on network file systems. The
    file's text only tells people who holds it. is_held: see `locked`, whose errors it raises.

    Raises OSError: the lock file cannot be made.
    """

    def __init__(self, folder: Path, grace_seconds: float = GRACE_SECONDS) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        self._opened_folder = os.open(folder, os.O_RDONLY)  # while it is open, its inode is not reused
        try:
            require(
                stat.S_ISREG(os.fstat(self._descriptor).st_mode),
                f"--save {folder}: {LOCK} in it is a pipe or a device, not a file: remove it.",
            )
            self.is_held = locked(self._descriptor, folder, self._refusal, grace_seconds)
        except ConfigurationError:
            self.release()
            raise
        if not self.is_held:
            return
        if not self.is_in_place:  # the process that held it has removed the file
            self.release()
            self.__init__(folder, grace_seconds)
            return
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        try:
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, f"process {os.getpid()} on {socket.gethostname()} since {since}\n".encode(), 0)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(folder / LOCK)) from error

    @property
    def is_in_place(self) -> bool:
        """Whether the folder still holds this lock's file; False if the folder was moved or removed."""
        return _is_at(self._descriptor, self._folder / LOCK)

    @property
    def is_of_the_same_folder(self) -> bool:
        """Whether the folder is still the one that was locked, with or without the lock's file."""
        return _is_at(self._opened_folder, self._folder)

    def release(self) -> None:
        """Give up the lock. The file stays, because another process may lock it next."""
        os.close(self._descriptor)
        os.close(self._opened_folder)

    def _refusal(self) -> str:
        holder = os.pread(self._descriptor, 1000, 0).decode(errors="replace").strip()
        return (
            f"--save {self._folder}: another run is saving there ({holder or 'unknown'}): wait for its end, stop it, "
            "or give another --save."
        )


def locked(file: int, path: Path, refusal: Callable[[], str], grace_seconds: float = GRACE_SECONDS) -> bool:
    """Lock an open file; False, with a warning, on a file system without locks. `path` is what it is locked for.

    Raises ConfigurationError, with `refusal`: another process still holds it after `grace_seconds`.
    """
    deadline = time.monotonic() + grace_seconds
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except (BlockingIOError, PermissionError) as error:
            if time.monotonic() >= deadline:
                raise ConfigurationError(refusal()) from error
            time.sleep(0.1)
        except OSError as error:
            logger.warning("%s cannot be locked (%s): make sure that only one run saves there", path, error)
            return False


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


# Where the files of a Megatron checkpoint are:
#
# FOLDER/.metadata                                 written by hf-to-megatron, or an iteration of a run
# FOLDER/iter_0000050/.metadata                    named by FOLDER/latest_checkpointed_iteration.txt
# FOLDER/release/mp_rank_00/model_optim_rng.pt     the old format, a file per rank, below any of these

INDEX = ".metadata"
RANK_FOLDERS, RANK_FOLDER = "mp_rank_[0-9][0-9]*", re.compile(r"mp_rank_(\d{2})(?:_(\d{3}))?")
RANK_FILES = ("model_optim_rng.pt", "model_rng.pt")


def megatron_files(folder: str | Path) -> Path | None:
    """The folder with Megatron's files: `folder`, or the checkpoint in it that its tracker names; None without any."""
    folder = Path(folder)
    places = [folder, newest_checkpoint(folder) if folder.is_dir() else None, _named_by_tracker(folder)]
    holding = (place for place in places if place and ((place / INDEX).is_file() or any(place.glob(RANK_FOLDERS))))
    return next(holding, None)
