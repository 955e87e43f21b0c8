"""Arrays that grow with the records, such as the order of an epoch: a file of the node that all of its ranks map."""

import fcntl
import logging
import os
import shutil
import tempfile
import weakref
from pathlib import Path

import numpy as np

from megatron_peft.config import writing
from megatron_peft.data.samples import Make
from megatron_peft.runtime.launch import from_first_of, place_on_node

logger = logging.getLogger(__name__)


class NodeFiles:
    """Arrays in a folder of this node, which goes with the process that made it, or at the next start."""

    def __init__(self) -> None:
        """A collective over all ranks. Raises ConfigurationError, on every rank, if a node has no place for it."""
        self.folder = from_first_of(place_on_node().node, self._start)

    def _start(self) -> Path:
        name, root = f"megatron_peft-{os.uname().nodename}", Path(tempfile.gettempdir())
        with writing("arrays of the data", "give TMPDIR a folder of this node with room", f"cannot be kept in {root}"):
            folder = Path(tempfile.mkdtemp(prefix=f"{name}-{os.getpid()}-"))
        for left in root.glob(f"{name}-*"):
            host, pid, _ = left.name.rsplit("-", 2)
            if host == name and not Path("/proc", pid).exists():  # its process was killed
                shutil.rmtree(left, ignore_errors=True)
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        return folder

    def kept(self, name: str, kind: str, epoch: int, dtype: type, make: Make) -> np.ndarray:
        """Return the arrays that `make` gives, one after the other, mapped: the first process or thread makes them.

        Those of the epoch before the last are removed: a rank that is further behind makes them anew. Where they cannot
        be written, this process has its own.
        """
        path = self.folder / f"{name}-{kind}-{epoch}"
        draft = path.with_suffix(".draft")
        try:
            with open(self.folder / f"{name}-{kind}.lock", "wb") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not path.exists():
                    with draft.open("wb") as file:
                        for array in make():
                            array.tofile(file)
                    draft.rename(path)
                    path.with_name(f"{name}-{kind}-{epoch - 2}").unlink(missing_ok=True)
                return np.memmap(path, dtype, "r") if path.stat().st_size else np.zeros(0, dtype)
        except OSError as error:
            draft.unlink(missing_ok=True)
            logger.warning("each rank keeps arrays of the samples in its own memory: %s (%s)", self.folder, error)
            return np.concatenate(make())
