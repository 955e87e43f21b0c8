"""One writer for each --save folder: a lock that ends with its process, however that ends.

It is the kernel's lock of a byte range (`fcntl`), owned by the process: kill -9 gives it up, forked workers of the data
do not inherit it, and network file systems know it. The file's text tells people who holds it; nothing relies on it.
"""

import fcntl
import logging
import os
import socket
import time
from pathlib import Path

from megatron_peft.config import ConfigurationError

logger = logging.getLogger(__name__)

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
        try:
            self.is_held = self._acquire(time.monotonic() + grace_seconds)
        except ConfigurationError:
            os.close(self._descriptor)
            raise
        if self.is_held:
            self._say_who()

    def release(self) -> None:
        """The file stays: taking it away could take it from the next process."""
        os.close(self._descriptor)

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
