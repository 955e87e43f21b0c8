"""Settings that every test shares."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version

import pytest

# Before torch is imported: the ranks of a distributed test share the cores, so each keeps to one thread.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Which versions the counts are of. At the end, because pytest prints no header where it is quiet."""
    versions = [f"{name} {version(name)}" for name in ("torch", "megatron-core", "transformers")]
    terminalreporter.write_line(", ".join([f"Python {platform.python_version()}", *versions]))
