"""Which files are synced and which get their names, in order: what a loss of power may leave behind."""

import os
from pathlib import Path

import pytest


def recorded_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Path]]:
    """Filled from now on: ("fsync", what it syncs), ("rename" or "replace", the new name)."""
    calls: list[tuple[str, Path]] = []

    def record(name: str, path_of) -> None:
        plain = getattr(os, name)

        def recorded(*args, **kwargs):
            calls.append((name, Path(path_of(*args))))
            return plain(*args, **kwargs)

        monkeypatch.setattr(os, name, recorded)

    record("fsync", lambda descriptor: os.readlink(f"/proc/self/fd/{descriptor}"))
    record("rename", lambda source, target: target)
    record("replace", lambda source, target: target)
    return calls
