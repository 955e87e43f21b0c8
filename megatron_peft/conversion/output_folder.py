"""A folder that appears whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_peft.config import ConfigurationError, require


def check_new(output: str | Path) -> None:
    """ConfigurationError if there is something at `output` already: nothing is ever overwritten."""
    require(not os.path.lexists(output), f"--output {output} exists already: remove it, or give another --output.")


@contextmanager
def new_folder(output: str | Path) -> Iterator[Path]:
    """A draft beside `output` to write into; it gets its name at the end, on the disk, and is removed on any error.

    Raises:
        ConfigurationError: `output` exists, its parent cannot be written, or the disk is full.
    """
    output = Path(output)
    check_new(output)
    draft: Path | None = None
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=".draft", dir=output.parent))
        draft.chmod(0o777 & ~_umask())
        yield draft
        for path in (*draft.iterdir(), draft):
            _sync(path)
        check_new(output)
        draft.rename(output)
        _sync(output.parent)
    except OSError as error:
        raise ConfigurationError(
            f"--output {output} could not be written ({error.strerror or error}): nothing is left of it. Make room "
            f"there, or give another --output."
        ) from error
    finally:
        if draft is not None:
            shutil.rmtree(draft, ignore_errors=True)  # gone already when all went well


def _umask() -> int:
    """Of this process; it can only be read by setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
