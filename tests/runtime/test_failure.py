"""A failure on any rank ends all of them, soon, with one exit code and one message."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_peft.runtime.failure import FAREWELL_SECONDS
from megatron_peft.runtime.launch import free_port
from tests.time_limits import seconds

ROOT = Path(__file__).resolve().parents[2]
SIZES = {
    "configuration on one": 3,
    "configuration on all": 2,
    "error on one": 2,
    "error on the first": 2,
    "no error": 2,
}
FAILING = [case for case in SIZES if case != "no error"]


@dataclass(frozen=True)
class Outcome:
    exit_codes: list[int]
    output: str
    ended_at: float


@pytest.fixture(scope="module")
def outcomes():
    return {case: _run(case, size) for case, size in SIZES.items()}


def _run(case: str, size: int) -> Outcome:
    world = {**os.environ, "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(size)}
    command = [sys.executable, "-m", "tests.runtime.failure_runs", case]
    processes = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env={**world, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(size)
    ]
    output = "".join(process.communicate(timeout=seconds(120))[0] for process in processes)
    return Outcome([process.returncode for process in processes], output, time.time())


@pytest.mark.parametrize("case", ["configuration on one", "configuration on all"])
def test_a_configuration_error_is_said_once_without_a_traceback(outcomes, case):
    found = outcomes[case]
    assert found.exit_codes == [2] * SIZES[case], found.output
    assert found.output.count("program: error: --lr is wrong.") == 1
    assert "Traceback" not in found.output


@pytest.mark.parametrize("case", ["error on one", "error on the first"])
def test_any_other_error_is_said_once_with_its_rank(outcomes, case):
    found = outcomes[case]
    assert found.exit_codes == [1] * SIZES[case], found.output
    assert found.output.count("RuntimeError: lost") == 1
    failed = 0 if case == "error on the first" else SIZES[case] - 1
    assert f"program: rank {failed} failed:" in found.output


@pytest.mark.parametrize("case", FAILING)
def test_nobody_waits_for_a_timeout(outcomes, case):
    raised_at = [float(text) for text in re.findall(r"raised at ([\d.]+)", outcomes[case].output)]
    assert outcomes[case].ended_at - max(raised_at) < seconds(FAREWELL_SECONDS)


def test_without_a_failure_nothing_is_said(outcomes):
    assert outcomes["no error"].exit_codes == [0, 0]
    assert outcomes["no error"].output == "ended well\n" * 2
