"""What every test shares: one thread a process, no network, limits of time that a variable stretches."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version

from tests.time_limits import seconds

# Before torch is imported: the ranks of a distributed test share the cores, so each keeps to one thread.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("PYTEST_TIMEOUT", str(seconds(600)))  # a hang of several ranks must not stop the suite


def pytest_report_header() -> str:
    return f"Python {platform.python_version()}, torch {version('torch')}, megatron-core {version('megatron-core')}"
