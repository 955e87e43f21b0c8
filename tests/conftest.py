"""What every test shares: one thread a process, no network, limits of time that a variable stretches."""

import gc
import os
import platform
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from megatron_peft.benchmarks import SIZES_VARIABLE
from tests.time_limits import seconds

if SIZES_VARIABLE not in os.environ:  # but for check-gpu, the suite computes on the CPU, and so does what it starts
    import megatron_peft.runtime.no_gpu  # noqa: F401

ROOT = Path(__file__).parents[1]
# Before torch is imported: the ranks of a distributed test share the cores, so each keeps to one thread.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # as pretrain_peft.py sets it
os.environ.setdefault("PYTEST_TIMEOUT", str(seconds(600)))  # a hang of several ranks must not stop the suite
# Programs and ranks that a test starts are of this tree, wherever another one is installed.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
# A busy machine is no failure: neither a slow example nor slow drawing of examples.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")
# Folders whose tests share fixtures that cost seconds stay on one of the workers; elsewhere those of a file do.
TOGETHER = ("tests/checkpoint/", "tests/conversion/")
# Here those of a method do, which share its run on one process: their names are [method] and [method-LAYOUT-...].
APART = "tests/training/test_layout.py"


def group_of(nodeid: str) -> str:
    """Tests of one group follow one another on one of the workers that `make test` runs them on."""
    file = nodeid.split("::")[0]
    folder = next((start for start in TOGETHER if file.startswith(start)), file)
    return re.findall(r"\[([a-z-]*[a-z])", nodeid)[0] if file == APART else folder


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    # Not by xdist's marks of groups: with pytest 9.1 their names do not reach the scheduler.
    from xdist.scheduler import LoadScopeScheduling

    scheduler = LoadScopeScheduling(config, log)
    scheduler._split_scope = group_of  # type: ignore[method-assign]
    return scheduler


def pytest_collection_finish() -> None:
    gc.freeze()  # imported modules stay: to go through them takes most of the time of a collection


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """A file leaves no world open: the files after it would fail instead."""
    distributed = sys.modules.get("torch.distributed")
    if distributed and distributed.is_initialized() and (nextitem is None or nextitem.path != item.path):
        distributed.destroy_process_group()
        pytest.fail(f"{item.path.name} leaves a process group behind")


@pytest.fixture
def figure(record_property: Callable[[str, object], None]) -> Callable[..., None]:
    """Records a `Figure` (its arguments) for check-gpu; one that misses its target fails the test."""
    from megatron_peft.benchmarks.measure import Figure

    def record(*words: Any, **more: Any) -> None:
        found = Figure(*words, **more)
        record_property("figure", asdict(found))
        if found.reached is False:
            record_property("missed", f"{found.name} is {found.measured:.4g}, not at most {found.target:.4g}")

    return record


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Iterator[None]:
    """At the end of a test, so that one figure that misses its target hides no other."""
    done = yield
    missed = [words for kind, words in pyfuncitem.user_properties if kind == "missed"]
    assert not missed, "missed: " + "; ".join(map(str, missed))
    return done


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Which versions the counts are of. At the end, because pytest prints no header where it is quiet."""
    versions = [f"{name} {version(name)}" for name in ("torch", "megatron-core", "transformers")]
    terminalreporter.write_line(", ".join([f"Python {platform.python_version()}", *versions]))
