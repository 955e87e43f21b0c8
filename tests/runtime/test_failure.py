"""A failure on any rank ends all of them, soon, with one exit code and one message; the tests' launcher tells it."""

import math
import os
import re
import signal
import subprocess
import sys
import time
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from megatron_peft.cli.parser import tell_error
from megatron_peft.config import ConfigurationError
from megatron_peft.runtime import failure
from megatron_peft.runtime.exit_signals import ends_before_training
from megatron_peft.runtime.failure import LEAVE_TIMEOUT_SECONDS, run_together
from megatron_peft.runtime.ranks import free_port
from megatron_peft.training.step import NonFiniteError
from tests.ranks import Ranks, RanksFailed, run_ranks
from tests.time_limits import seconds

WRONG, LOST = ConfigurationError("--lr is wrong."), RuntimeError("lost")
# What is raised on which ranks of how many.
CASES = {
    "configuration on one": (WRONG, [2], 3),
    "configuration on all": (WRONG, [0, 1], 2),
    "error on one": (LOST, [1], 2),
    "error on the first": (LOST, [0], 2),
    "not finite": (NonFiniteError("iteration 3: the loss is NaN."), [0, 1], 2),
    "no error": (None, [], 2),
}


def _program(error: Exception | None, failing: list[int]) -> None:
    """The ranks that do not fail wait in a collective, as in a step."""
    rank = dist.get_rank()
    if error is None:
        time.sleep(0.7 * rank)  # longer than the others poll the store
    elif rank in failing:
        print(f"raised at {time.time()}", flush=True)
        raise error
    else:
        dist.all_reduce(torch.zeros(1))


def _rank(case: str) -> None:
    dist.init_process_group("gloo")
    run_together(lambda: _program(*CASES[case][:2]), "program")
    dist.destroy_process_group()
    print("ended well", flush=True)


class Outcome(NamedTuple):
    exit_codes: list[int | None]
    output: str
    ended_at: float


@pytest.fixture(scope="module")
def outcomes() -> dict[str, Outcome]:
    found = {}
    for case, (_, _, size) in CASES.items():
        with Ranks(size, _rank, case) as ranks:
            for process in ranks.processes:  # none is ended from outside
                process.join(seconds(120))
            assert None not in ranks.exit_codes, f"{case}: a rank never ended"
            found[case] = Outcome(ranks.exit_codes, "".join(map(ranks.output, range(size))), time.time())
    return found


@pytest.mark.parametrize(
    ("case", "exit_code", "told"),
    [
        ("configuration on one", 2, "program: error: --lr is wrong."),
        ("configuration on all", 2, "program: error: --lr is wrong."),
        ("not finite", 1, "program: error: iteration 3: the loss is NaN."),
        ("error on one", 1, "program: rank 1 failed:"),
        ("error on the first", 1, "program: rank 0 failed:"),
    ],
)
def test_all_ranks_end_with_one_exit_code_and_one_message(outcomes, case, exit_code, told):
    found = outcomes[case]
    assert found.exit_codes == [exit_code] * CASES[case][2], found.output
    assert found.output.count(told) == 1, found.output
    is_told_with_its_place = case.startswith("error")  # other messages are enough
    assert found.output.count("Traceback") == found.output.count("RuntimeError: lost") == is_told_with_its_place


@pytest.mark.parametrize("case", [case for case in CASES if case != "no error"])
def test_no_rank_waits_for_a_timeout(outcomes, case):
    raised_at = [float(text) for text in re.findall(r"raised at ([\d.]+)", outcomes[case].output)]
    assert outcomes[case].ended_at - max(raised_at) < seconds(LEAVE_TIMEOUT_SECONDS)


def test_without_a_failure_nothing_is_printed(outcomes):
    assert (outcomes["no error"].exit_codes, outcomes["no error"].output) == ([0, 0], "ended well\n" * 2)


# `megatron-peft train`, up to its first collective. torch reads the variable as it is imported: not before main.
LEFT_BEHIND = """
import types
from megatron_peft.commands import train

def step(*_):
    import torch.distributed as dist, torch
    dist.barrier()  # both have opened the store
    dist.all_reduce(torch.zeros(1))

def config(*_):
    from megatron_peft.training import run
    run.finetune = step
    world = {"distributed_backend": "gloo", "distributed_timeout_minutes": 1}
    of = types.SimpleNamespace
    return of(parallel=of(**world), training=of(exit_signal_handler=True), checkpoint=of(save=None))

flags = types.SimpleNamespace(values={"program": {}}, launch={}, config=config, program="p", command_line=[])
train.run_file = lambda *_: ""
train.run(flags)
"""
# The one that is killed needs no more of it than its place in the world.
KILLED = """
import os, signal
import torch, torch.distributed as dist
dist.init_process_group("gloo")
dist.barrier()
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_rank_that_is_killed_is_one_line_on_the_others() -> None:
    """The first hosts the store: what the others want to tell one another has nowhere to go."""
    meeting = {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(free_port()),
        "PYTHONWARNINGS": "ignore",
    }
    plain = {name: value for name, value in os.environ.items() if name != "TORCH_CPP_LOG_LEVEL"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", program], env={**plain, **meeting, "RANK": rank, "LOCAL_RANK": rank}, **pipes
        )
        for rank, program in (("0", KILLED), ("1", LEFT_BEHIND))
    ]
    lines = [rank.communicate(timeout=seconds(120))[0] for rank in ranks][1].splitlines()
    told = [line for line in lines if "No CUDA runtime is found" not in line]  # of torch's CUDA build without a GPU
    assert [rank.returncode for rank in ranks] == [-signal.SIGKILL, 1] and len(told) == 1, told
    assert re.search("rank 1 lost its connection to another rank|rank 0 is gone", told[0])


def _interrupted(_: None) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's job in the background ignores
    dist.init_process_group("gloo")
    run_together(lambda: os.kill(os.getpid(), signal.SIGINT), "program")


def test_an_interrupt_is_one_line() -> None:
    with Ranks(1, _interrupted) as ranks:
        ranks.processes[0].join(seconds(60))
        assert (ranks.exit_codes, ranks.output(0)) == ([130], "program: interrupted\n")


def _signalled_as_it_fails(_: None) -> None:
    def told(message: str) -> None:
        print(message, flush=True)
        os.kill(os.getpid(), signal.SIGTERM)  # as torchrun does to the ranks that are left

    failure.print_failure = told
    dist.init_process_group("gloo")
    with ends_before_training(True):
        run_together(lambda: 1 // 0, "program")


def test_the_cause_is_the_last_line_of_a_rank_that_its_launcher_ends() -> None:
    with Ranks(1, _signalled_as_it_fails) as ranks:
        ranks.processes[0].join(seconds(60))
        assert ranks.exit_codes == [1] and "SIGTERM" not in ranks.output(0)
        assert ranks.output(0).strip().endswith("ZeroDivisionError: integer division or modulo by zero")


def test_results_come_by_rank() -> None:
    assert run_ranks(2, os.getenv, "RANK") == ["0", "1"]


def test_what_a_failing_rank_printed_is_in_the_error() -> None:
    with pytest.raises(RanksFailed, match="--- rank 0(.|\n)*math domain error"):
        run_ranks(1, math.sqrt, -1.0)


def test_ranks_that_take_too_long_are_stopped() -> None:
    start = time.monotonic()
    with pytest.raises(RanksFailed, match="rank 0"):
        run_ranks(1, time.sleep, 600, limit=0.2)
    assert time.monotonic() - start < seconds(60)


def test_the_report_of_torchrun_ends_with_our_message(tmp_path, capsys):
    path = tmp_path / "error.json"
    assert tell_error(WRONG, {"TORCHELASTIC_ERROR_FILE": str(path)}, "program") == 2
    assert capsys.readouterr().err == "program: error: --lr is wrong.\n"
    failure = ProcessFailure(0, 1, 2, str(path))
    assert failure.message == "program: error: --lr is wrong." and abs(failure.timestamp - time.time()) < 3600
    assert tell_error(WRONG, {"TORCHELASTIC_ERROR_FILE": str(tmp_path / "gone" / "error.json")}, "program") == 2
    assert "--lr is wrong" in capsys.readouterr().err
