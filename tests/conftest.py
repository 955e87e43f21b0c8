"""Settings that every test shares."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

# Before torch is imported: the ranks of a distributed test share the cores, so each keeps to one thread.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(autouse=True, scope="module")
def environment_of_ranks() -> Iterator[None]:
    """A world that a module starts in its own process leaves no trace for programs that a later module starts."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    before = {name: os.environ.get(name) for name in names}
    yield
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
