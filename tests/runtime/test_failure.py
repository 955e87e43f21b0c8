"""A failure on any rank ends all of them, soon, with one exit code and one message."""

from __future__ import annotations

import multiprocessing
import os
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_peft.config import ConfigurationError
from megatron_peft.runtime.failure import FAREWELL_SECONDS, run_together
from megatron_peft.runtime.launch import free_port

WRONG, LOST = ConfigurationError("--lr is wrong."), RuntimeError("lost")
# What is raised on which ranks of how many.
CASES = {
    "configuration on one": (WRONG, [2], 3),
    "configuration on all": (WRONG, [0, 1], 2),
    "error on one": (LOST, [1], 2),
    "error on the first": (LOST, [0], 2),
    "no error": (None, [], 2),
}


def _program(error: Exception | None, failing: list[int]) -> None:
    """The ranks that do not fail wait in a collective, as in a step."""
    rank = dist.get_rank()
    if error is None:
        time.sleep(0.7 * rank)  # longer than the others look at the board
    elif rank in failing:
        print(f"raised at {time.time()}", flush=True)
        raise error
    else:
        dist.all_reduce(torch.zeros(1))


def _rank(case: str, world: dict[str, str], output: Path) -> None:
    os.environ.update(world)
    sys.stdout = sys.stderr = output.open("w")
    dist.init_process_group("gloo")
    run_together(lambda: _program(*CASES[case][:2]), "program")
    dist.destroy_process_group()
    print("ended well", flush=True)


@dataclass(frozen=True)
class Outcome:
    exit_codes: list[int | None]
    output: str
    ended_at: float


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    return {case: _run(case, tmp_path_factory.mktemp("ranks")) for case in CASES}


def _run(case: str, folder: Path) -> Outcome:
    size = CASES[case][2]
    world = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(size)}
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=_rank, args=(case, {**world, "RANK": str(n)}, folder / str(n))) for n in range(size)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(timeout=120)
    hanging = [rank for rank in ranks if rank.is_alive()]
    for rank in hanging:
        rank.kill()
    assert not hanging, f"{case}: {len(hanging)} ranks never ended"
    output = "".join((folder / str(n)).read_text() for n in range(size))
    return Outcome([rank.exitcode for rank in ranks], output, time.time())


@pytest.mark.parametrize("case", ["configuration on one", "configuration on all"])
def test_a_configuration_error_is_said_once_without_a_traceback(outcomes, case):
    found = outcomes[case]
    assert found.exit_codes == [2] * CASES[case][2], found.output
    assert found.output.count("program: error: --lr is wrong.") == 1
    assert "Traceback" not in found.output


@pytest.mark.parametrize("case", ["error on one", "error on the first"])
def test_any_other_error_is_said_once_with_its_rank(outcomes, case):
    _, (failed,), size = CASES[case]
    found = outcomes[case]
    assert found.exit_codes == [1] * size, found.output
    assert found.output.count("RuntimeError: lost") == 1
    assert f"program: rank {failed} failed:" in found.output


@pytest.mark.parametrize("case", [case for case in CASES if case != "no error"])
def test_nobody_waits_for_a_timeout(outcomes, case):
    raised_at = [float(seconds) for seconds in re.findall(r"raised at ([\d.]+)", outcomes[case].output)]
    assert outcomes[case].ended_at - max(raised_at) < FAREWELL_SECONDS


def test_without_a_failure_nothing_is_said(outcomes):
    assert outcomes["no error"].exit_codes == [0, 0]
    assert outcomes["no error"].output == "ended well\n" * 2
