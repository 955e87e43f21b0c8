"""A large file written from start to end past the system's page cache.

What a conversion writes is not read again soon: in the cache it would push out what is, cost a copy of every page, and
be written out by the fsync at the end. Here a block that is full goes to the disk from the process's own memory, so
that nothing is left for the fsync. Where the file system or the system knows no direct access, and for the last bytes
of a file, which are no whole page, writing is the common kind.
"""

import errno
import fcntl
import mmap
import os
from pathlib import Path
from types import TracebackType

BLOCK_BYTES = 4 * 2**20
_DIRECT: int = getattr(os, "O_DIRECT", 0)  # macOS has none


class DirectFile:
    """A new file to write to, with as much of a binary file as torch.save asks for. Close it: nothing else does.

    Errors are the OSErrors of `open` and `write`; a disk that is full may be told of as late as in `close`.
    """

    def __init__(self, path: Path) -> None:
        self._descriptor = _open(path)
        self._block = mmap.mmap(-1, BLOCK_BYTES)  # starts at a page, as direct access wants it
        self._filled = self._written = 0
        self._closed = False

    def write(self, data: bytes | memoryview) -> int:
        """All of `data`."""
        left = memoryview(data).cast("B")
        total = len(left)
        while left:
            piece, left = left[: BLOCK_BYTES - self._filled], left[BLOCK_BYTES - self._filled :]
            end = self._filled + len(piece)
            self._block[self._filled : end] = piece
            self._filled = end
            if end == BLOCK_BYTES:
                self._put(memoryview(self._block))
                self._filled = 0
        return total

    def tell(self) -> int:
        """Bytes so far."""
        return self._written + self._filled

    def flush(self) -> None:
        """Nothing: half a block stays here until `close`."""

    def close(self) -> None:
        """Write what is left of a block. A second call does nothing."""
        if self._closed:
            return
        self._closed = True
        try:
            if self._filled:
                _clear_direct(self._descriptor)
                self._put(memoryview(self._block)[: self._filled])
                self._filled = 0
        finally:
            os.close(self._descriptor)

    def __enter__(self) -> "DirectFile":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self.close()

    def _put(self, data: memoryview) -> None:
        while data:
            try:
                count = os.write(self._descriptor, data)
            except OSError as error:
                if error.errno != errno.EINVAL or not _clear_direct(self._descriptor):
                    raise
                continue  # this file system opens for direct access, and then refuses it
            if count % mmap.PAGESIZE:  # the disk is full, or nearly: the rest starts within a page
                _clear_direct(self._descriptor)
            self._written += count
            data = data[count:]


def _open(path: Path) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0)
    try:
        return os.open(path, flags | _DIRECT, 0o666)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        path.unlink(missing_ok=True)  # Linux makes the file before it refuses
        return os.open(path, flags, 0o666)


def _clear_direct(descriptor: int) -> bool:
    """From here on writing is the common kind. Returns whether it was not."""
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    fcntl.fcntl(descriptor, fcntl.F_SETFL, flags & ~_DIRECT)
    return bool(flags & _DIRECT)
