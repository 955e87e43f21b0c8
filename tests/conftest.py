"""What every test shares: one thread a process, no network, limits of time that a variable stretches."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.time_limits import seconds

ROOT = Path(__file__).parents[1]
# Before torch is imported: the ranks of a distributed test share the cores, so each keeps to one thread.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("PYTEST_TIMEOUT", str(seconds(600)))  # a hang of several ranks must not stop the suite
# Programs and ranks that a test starts are of this tree, wherever another one is installed.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
# A busy machine is no failure: neither a slow example nor slow drawing of examples.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")
# Folders whose tests share fixtures that cost seconds, and files that run programs in the sandbox, whose processes are
# counted together; elsewhere a file's tests stay together.
FOLDERS = ("checkpoint", "conversion")
SANDBOX = ("test_sandbox", "test_task_metrics")


def pytest_itemcollected(item: pytest.Item) -> None:
    """Tests that share fixtures go to the same of the workers that `make test` runs them on."""
    if item.get_closest_marker("xdist_group") is None:
        folder, file = item.path.parent.name, item.path.stem
        group = folder if folder in FOLDERS else "sandbox" if file.startswith(SANDBOX) else str(item.path)
        item.add_marker(pytest.mark.xdist_group(group))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Which versions the counts are of. At the end, because pytest prints no header where it is quiet."""
    versions = [f"{name} {version(name)}" for name in ("torch", "megatron-core", "transformers")]
    terminalreporter.write_line(", ".join([f"Python {platform.python_version()}", *versions]))
