"""A rank that hangs: the others end within the short timeout and say where they waited, and all write their stacks."""

import ctypes
import datetime
import re
import signal
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist

from megatron_peft.config import LoggingConfig
from megatron_peft.runtime import cpu, failure
from megatron_peft.runtime.failure import run_together, stacks_folder, stacks_written, written_after
from megatron_peft.runtime.launch import shorten_timeout
from megatron_peft.training.watchers import OwnWork
from tests.ranks import Ranks
from tests.time_limits import seconds

TIMEOUT_SECONDS = 3
HANGING, SIZE = 1, 3


def hangs_here() -> None:
    time.sleep(600)


def hangs_and_locks_the_interpreter() -> None:
    ctypes.PyDLL(None).sleep(12)


HANGS = {function.__name__: function for function in (hangs_here, hangs_and_locks_the_interpreter)}


def _program(hang: str, folder: str) -> None:
    """A rank's work is longer than the others'; then it hangs in a step, or none does."""
    shorten_timeout(TIMEOUT_SECONDS)
    work = OwnWork(LoggingConfig(log_straggler=True))
    with work.of_device():
        time.sleep(0.3 * (dist.get_rank() == HANGING))
    found = work.record(num_steps=1)["slowest_rank"]
    print(f"slowest: {found['rank']} {found['seconds'] > 0.2 > found['median_seconds']}", flush=True)
    print(f"began at {time.time()}", flush=True)
    tempfile.tempdir = folder
    with stacks_written(stacks_folder(), dist.get_rank()), written_after(TIMEOUT_SECONDS - 1):
        if hang and dist.get_rank() == HANGING:
            HANGS[hang]()
        dist.all_reduce(torch.zeros(4))


def _rank(case: tuple[str, str]) -> None:
    cpu.install()
    dist.init_process_group("gloo", timeout=datetime.timedelta(minutes=10))
    run_together(lambda: _program(*case), "program")


class Outcome(NamedTuple):
    exit_codes: list[int | None]
    output: str
    seconds: float
    stacks: list[str]


def run(hang: str, folder: Path) -> Outcome:
    with Ranks(SIZE, _rank, (hang, str(folder))) as ranks:
        for rank, process in enumerate(ranks.processes):
            if rank != HANGING:
                process.join(seconds(120))
        ended_at = time.time()
        ranks.processes[HANGING].kill()  # by its launcher
        ranks.processes[HANGING].join()
        codes, output = ranks.exit_codes, "".join(map(ranks.output, range(SIZE)))
    texts = [next(folder.rglob(f"rank_{rank}.txt")).read_text() for rank in range(SIZE)]
    began_at = max(float(text) for text in re.findall(r"began at ([\d.]+)", output))
    return Outcome(codes, output, ended_at - began_at, texts)


@pytest.fixture(scope="module")
def hung(tmp_path_factory) -> Outcome:
    return run("hangs_here", tmp_path_factory.mktemp("hung"))


def test_ranks_that_wait_too_long_end_and_name_where(hung: Outcome) -> None:
    assert [code for rank, code in enumerate(hung.exit_codes) if rank != HANGING] == [1] * (SIZE - 1), hung.output
    assert hung.seconds < seconds(60), "the timeout of 10 minutes counted"
    told = hung.output.split("program: rank 0 ")[1]
    assert told.startswith(f"waited {TIMEOUT_SECONDS} s for another rank") and "Traceback" not in hung.output
    assert "in all_reduce" in told and "in _program" in told, told
    assert re.search(r"\nThe stacks of the ranks are on their nodes, in /.*/hung0/megatron_peft_\d+_run_\d+\.\n", told)


def test_every_rank_writes_its_stacks(hung: Outcome) -> None:
    assert "in hangs_here" in hung.stacks[HANGING] and all("in _program" in text for text in hung.stacks)


@pytest.mark.slow
def test_a_rank_that_hangs_outside_of_python_has_its_stacks_written_too(tmp_path: Path) -> None:
    found = run("hangs_and_locks_the_interpreter", tmp_path)
    assert "in hangs_and_locks_the_interpreter" in found.stacks[HANGING]


def test_the_slowest_rank_is_named(hung: Outcome) -> None:
    assert hung.output.count(f"slowest: {HANGING} True\n") == SIZE, hung.output


def test_without_a_hang_nothing_is_left(tmp_path: Path) -> None:
    folder = tmp_path / "of this run"
    with stacks_written(folder, 0), written_after(60):
        assert (folder / "rank_0.txt").exists() and folder.stat().st_mode & 0o777 == 0o700
    assert not folder.exists()
    with written_after(0.01):  # without a file nothing is written
        time.sleep(0.05)


def _aborts(folder: Path) -> None:
    with stacks_written(folder, 0):
        signal.raise_signal(signal.SIGABRT)


def test_nccls_watchdog_leaves_stacks(tmp_path: Path) -> None:
    with Ranks(1, _aborts, tmp_path) as ranks:
        ranks.processes[0].join(seconds(60))
        assert ranks.exit_codes == [-signal.SIGABRT]
    assert "in _aborts" in (tmp_path / "rank_0.txt").read_text()


def test_what_a_failure_leaves_is_on_the_node_in_a_folder_of_this_user_and_run(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(failure.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "4711-0/../../etc")
    monkeypatch.setenv("MASTER_PORT", "29500")
    folder = failure.stacks_folder()
    assert folder == tmp_path / f"megatron_peft_{failure.os.getuid()}_4711-0_.._.._etc_29500"
    folder.mkdir()
    monkeypatch.setattr(failure.os, "getuid", lambda: 4321)  # it is another user's
    with stacks_written(folder, 0):
        assert not [*folder.iterdir()]
