"""What is read or made once for all ranks: the scan of a file, and arrays that the ranks of a node map.

Where lines begin, which samples are left, the order of an epoch: such arrays grow with the records. One rank of a node
writes them to a file of the node's own disk (TMPDIR), and all of its ranks map that.
"""

import fcntl
import hashlib
import logging
import os
import secrets
import shutil
import tempfile
import time
import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from functools import partial
from itertools import accumulate, count
from pathlib import Path
from typing import Any

import numpy as np

from megatron_peft.checkpoint import folders
from megatron_peft.config import ConfigurationError, kind_of_source, writing
from megatron_peft.data.files import Known, LineIndex, RecordFiles, digest_of_scans, holds_lines, opening, scan
from megatron_peft.data.samples import Make
from megatron_peft.runtime.launch import (
    checked_together,
    from_first_of,
    gather_over_world,
    place_in_world,
    place_on_node,
    ranks_with,
    share_of,
)

logger = logging.getLogger(__name__)

_GATHERED_BYTES = 1 << 24  # at once, over all ranks


class NodeFiles:
    """Arrays in a folder of this node, which goes with the process that made it, or at the next start."""

    def __init__(self) -> None:
        """A collective over all ranks. Raises ConfigurationError, on every rank, if a node has no place for it."""
        self.folder, self._numbers = from_first_of(place_on_node().node, self._start), count()

    def _start(self) -> Path:
        name = f"megatron_peft-{os.uname().nodename}"
        with _writing_on_node(Path(tempfile.gettempdir())):
            folder = Path(tempfile.mkdtemp(prefix=f"{name}-{os.getpid()}-"))
        for left in folder.parent.glob(f"{name}-*"):
            host, pid, _ = left.name.rsplit("-", 2)
            if host == name and not Path("/proc", pid).exists():  # its process was killed
                shutil.rmtree(left, ignore_errors=True)
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        return folder

    def gathered(self, own: np.ndarray, ranks: Sequence[int]) -> np.ndarray:
        """The arrays of those ranks, of which this is one, one after the other. [n] each -> [sum of n], mapped.

        A collective over all ranks. Raises ConfigurationError, on every rank, if a node has no room for it.
        """
        by_rank = gather_over_world((place_on_node().node, len(own)))
        nodes, lengths = zip(*(by_rank[rank] for rank in ranks), strict=True)
        is_writer = nodes.index(place_on_node().node) == ranks.index(place_in_world()[0])
        path, starts = self.folder / f"array-{next(self._numbers)}-{ranks[0]}", [0, *accumulate(lengths)]
        num_at_once = max(1, _GATHERED_BYTES // own.itemsize // len(by_rank))

        def write(begin: int, blocks: Sequence[np.ndarray]) -> None:
            if is_writer:
                with _writing_on_node(self.folder), path.open("r+b" if begin else "wb") as file:
                    for rank, start in zip(ranks, starts, strict=False):
                        file.seek((start + begin) * own.itemsize)
                        blocks[rank].tofile(file)

        for begin in range(0, max(length for _, length in by_rank), num_at_once):
            checked_together(partial(write, begin, gather_over_world(own[begin : begin + num_at_once])))
        return np.memmap(path, own.dtype, "r") if starts[-1] else own

    def kept(self, name: str, kind: str, epoch: int, dtype: type, make: Make) -> np.ndarray:
        """The arrays that `make` gives, one after the other, mapped: made by the first process or thread that asks.

        Those of the epoch before the last are removed: a rank that is further behind makes them anew. Where they cannot
        be written, this process has its own.
        """
        path = self.folder / f"{name}-{kind}-{epoch}"
        draft = path.with_suffix(".draft")
        try:
            with open(self.folder / f"{name}-{kind}.lock", "wb") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if path.exists():
                    return np.memmap(path, dtype, "r")
                with draft.open("wb") as file:
                    for array in make():
                        array.tofile(file)
                draft.rename(path)
                path.with_name(f"{name}-{kind}-{epoch - 2}").unlink(missing_ok=True)
                return np.memmap(path, dtype, "r")
        except OSError as error:
            draft.unlink(missing_ok=True)
            logger.warning("each rank keeps the order of samples in its own memory: %s (%s)", self.folder, error)
            return np.concatenate(make())


def _writing_on_node(folder: Path) -> AbstractContextManager[None]:
    return writing("arrays of the data", "give TMPDIR a folder of this node with room", f"cannot be kept in {folder}")


def sharers_of(root: Path) -> str:
    """What names the ranks that see a folder: "shared" if they see what rank 0 writes there, or else their node, whose
    disk may be its own. A collective over all ranks."""
    node, name = place_on_node().node, f".seen-{secrets.token_hex(8)}"

    def write() -> str:
        with suppress(OSError):  # in a folder that may only be read nobody shares work
            root.mkdir(parents=True, exist_ok=True)
            (root / name).touch()
        return name

    written = from_first_of("", write)
    is_seen = from_first_of(node, lambda: os.path.exists(root / written))
    with suppress(OSError):
        (root / name).unlink()
    return "shared" if is_seen else node


def read_once(paths: Sequence[str], flag: str, node: NodeFiles, cache_root: Path | None) -> Known:
    """What `RecordFiles` need not read on each rank. A collective over all ranks.

    JSON lines: ranks that see one file scan a share of its bytes each, unless `cache_root`, where there is one, has its
    index. Tables: the first rank of a node reads them, and `datasets` makes its cache.
    Raises ConfigurationError, on every rank, for a source that cannot be read, and for a line that is too long.
    """
    tables = [path for path in paths if kind_of_source(path) in ("table", "hub")]
    known = dict[str, LineIndex | int](from_first_of(place_on_node().node, lambda: RecordFiles(tables, flag).digests))
    sharers = sharers_of(cache_root) if cache_root else ""
    for path in dict.fromkeys(path for path in paths if path not in known):
        if index := _index_of(path, flag, node, cache_root, sharers):
            known[path] = index
    return known


INDEX_FORMAT, INDEX = 1, "lines.int64"  # in a cache: `LineIndex`, with the number of blanks behind them
SETTLED_SECONDS = 10  # within a tick of its file system's clock a file may change again, and nothing tells


def _index_of(path: str, flag: str, node: NodeFiles, root: Path | None, sharers: str) -> LineIndex | None:
    """None: the file holds an array, which each rank loads. A collective; sharers: the ranks that see `root`."""

    def look() -> tuple[bool, tuple[int, ...]]:
        with opening(path, flag):
            is_lines, stat = holds_lines(Path(path)), os.stat(path)  # once opened, nothing of it is out of date
            # Where all of this is equal, ranks see one file and not copies. No program sets the time of change.
            return is_lines, (stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns)

    def scan_own() -> Any:
        with opening(path, flag):
            return scan(Path(path), share_of(seen[0], place, len(ranks)))

    def keep() -> None:
        is_settled = time.time() - max(seen[2:]) / 1e9 >= SETTLED_SECONDS and look()[1] == seen
        if folder and is_settled and folders.damage(folder):  # else another start was faster
            shutil.rmtree(folder, ignore_errors=True)  # a damaged one
            with suppress(ConfigurationError), folders.new_folder(folder) as draft:  # unless another run was faster
                with (draft / INDEX).open("wb") as file:
                    last = np.asarray([len(index.blanks), index.end, index.digest])
                    for array in (index.starts, index.blanks, last):
                        array.tofile(file)
                folders.write_manifest(draft, {})

    is_lines, seen = checked_together(look)
    if not all(gather_over_world(is_lines)):
        return None
    # A file that has changed has another index, and a damaged one is made anew.
    name = hashlib.sha256(repr((INDEX_FORMAT, seen)).encode()).hexdigest()
    folder = root and root / f"lines-{name[:32]}"
    is_kept = from_first_of((sharers, seen), lambda: folder is not None and not folders.damage(folder))
    if folder and all(gather_over_world(is_kept)):
        kept = np.memmap(folder / INDEX, np.int64, "r")
        starts, blanks, (_, end, digest) = np.split(kept, [-3 - kept[-3], -3])
        return LineIndex(starts, blanks, int(end), int(digest))
    ranks = ranks_with(seen)
    place = ranks.index(place_in_world()[0])
    own, *buffers = checked_together(scan_own)
    starts, blanks = (np.frombuffer(each, np.int64) for each in buffers)
    by_rank = gather_over_world(own)
    scans = [by_rank[rank] for rank in ranks]
    digest = checked_together(lambda: digest_of_scans(path, scans, seen[0]))
    blanks = blanks + sum(before.records for before in scans[:place])
    index = LineIndex(node.gathered(starts, ranks), node.gathered(blanks, ranks), scans[-1].end, digest)
    from_first_of((sharers, seen), keep)
    return index
