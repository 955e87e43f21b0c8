"""A failure on any rank ends all of them, soon, with one message: here a launcher ends the others, as torchrun does."""

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from megatron_peft.cli.parser import tell_error
from megatron_peft.config import ConfigurationError
from megatron_peft.runtime import failure
from megatron_peft.runtime.exit_signals import EndedBySignal, ends_before_training
from megatron_peft.runtime.failure import run_together
from megatron_peft.runtime.launch import checked_together
from megatron_peft.runtime.ranks import free_port
from megatron_peft.training.step import NonFiniteError
from tests.ranks import Ranks, RanksFailed, run_ranks
from tests.time_limits import seconds

WRONG, LOST = ConfigurationError("--lr is wrong."), RuntimeError("lost")


def _interrupt() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's job in the background ignores
    os.kill(os.getpid(), signal.SIGINT)


def _fail_and_be_signalled() -> None:
    def told(message: str) -> None:
        print(message, flush=True)
        os.kill(os.getpid(), signal.SIGTERM)  # as torchrun does to the ranks that are left

    failure.print_failure = told
    _ = 1 // 0


def _fail_in_a_common_check(error: Exception) -> None:
    def check() -> None:
        if dist.get_rank() == 1:
            raise error

    checked_together(check)


def _killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _print_without_reader() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, 1)
    print("a line", flush=True)


class Case(NamedTuple):
    """What is raised or done on which ranks of how many, and the exit code and the message of the first to end."""

    does: Exception | Callable[[], None] | None
    failing: list[int]
    size: int
    exit_code: int
    told: str


IN_A_CHECK, LOST_IN_A_CHECK = partial(_fail_in_a_common_check, WRONG), partial(_fail_in_a_common_check, LOST)
CASES = {
    "configuration on one": Case(WRONG, [2], 3, 2, "program: error: --lr is wrong."),
    "configuration of all": Case(
        partial(_fail_in_a_common_check, WRONG), [0, 1], 2, 2, "program: error: --lr is wrong."
    ),
    "error on one": Case(LOST, [1], 2, 1, "program: rank 1 failed:"),
    "error in a common check": Case(LOST_IN_A_CHECK, [0, 1], 2, 1, "program: rank 1 failed:"),
    "error on the first": Case(LOST, [0], 2, 1, "program: rank 0 failed:"),
    "on all": Case(NonFiniteError("iteration 3: NaN."), [0, 1], 2, 1, "program: error: iteration 3: NaN."),
    "an interrupt": Case(_interrupt, [0], 1, 130, "program: interrupted"),
    "a launcher's signal": Case(_fail_and_be_signalled, [0], 1, 1, "program: rank 0 failed:"),
    "a closed pipe": Case(BrokenPipeError(32, "Broken pipe"), [0], 1, 1, "program: rank 0 failed:"),
    "no reader": Case(_print_without_reader, [0], 2, 141, ""),
    "killed": Case(_killed, [1], 2, -signal.SIGKILL, ""),  # the launcher reports it
    "no error": Case(None, [], 2, 0, "ended well"),
}


def _program(case: Case) -> None:
    """The ranks that do not fail wait in a collective, as in a step."""
    dist.barrier()  # all have started
    rank = dist.get_rank()
    if case.does is None:
        time.sleep(0.7 * rank)
    elif rank not in case.failing:
        dist.all_reduce(torch.zeros(1))
    elif isinstance(case.does, Exception):
        raise case.does
    else:
        case.does()


def _rank(case: str) -> None:
    dist.init_process_group("gloo")
    with ends_before_training(True):
        run_together(lambda: _program(CASES[case]), "program")
    dist.destroy_process_group()
    print("ended well", flush=True)


class Outcome(NamedTuple):
    exit_code: int | None  # of the first rank that failed
    output: str


def _launched(ranks: Ranks) -> Outcome:
    """Send SIGTERM to the others when a rank has failed. None may need SIGKILL, torchrun's half a minute later."""
    give_up, first = time.monotonic() + seconds(120), None
    while None in (codes := ranks.exit_codes):
        assert time.monotonic() < give_up, f"ranks never ended: {codes}"
        if first is None and any(codes):
            first = next(filter(None, codes))
            for process in ranks.processes:
                if process.is_alive():
                    process.terminate()
        time.sleep(0.1)
    return Outcome(first or next(filter(None, codes), 0), "".join(map(ranks.output, range(len(codes)))))


@pytest.fixture(scope="module")
def outcomes() -> dict[str, Outcome]:
    """Of all cases, which run side by side."""
    with ExitStack() as stack, ThreadPoolExecutor(len(CASES)) as launchers:
        worlds = {case: stack.enter_context(Ranks(CASES[case].size, _rank, case)) for case in CASES}
        return dict(zip(worlds, launchers.map(_launched, worlds.values()), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_all_ranks_end_with_one_message_and_the_exit_code_of_the_cause(outcomes, case):
    found, (_, _, size, exit_code, told) = outcomes[case], CASES[case]
    assert found.exit_code == exit_code, found.output
    assert found.output.count(told) == (1 if exit_code else size) if told else not found.output, found.output
    assert found.output.count("program:") == (exit_code != 0 and told != ""), found.output
    is_told_with_its_place = told.endswith("failed:")  # other messages are enough
    assert found.output.count("Traceback") == is_told_with_its_place
    assert found.output.count("RuntimeError: lost") == case.startswith("error"), found.output


@pytest.mark.parametrize("case", ["configuration of all", "error in a common check", "error on one", "killed"])
def test_ranks_end_without_a_launcher_too(case):
    with Ranks(2, _rank, case) as ranks:
        for process in ranks.processes:
            process.join(seconds(60))
        assert None not in ranks.exit_codes and 0 not in ranks.exit_codes, ranks.exit_codes
        lines = [line for rank in range(2) for line in ranks.output(rank).splitlines() if line.startswith("program")]
    told = CASES[case].told
    assert [line.startswith(told) for line in lines].count(True) == 1 if told else len(lines) == 1, lines
    others = [line for line in lines if not told or not line.startswith(told)]
    expected = "program: rank 1: RuntimeError: lost" if "check" in case else "program: rank 0 lost its connection"
    assert others == [] if case.startswith("configuration") else others[0].startswith(expected), lines


RESET = "Connection reset by peer"


@pytest.mark.parametrize(
    ("error", "num_ranks", "expected"),
    [
        pytest.param(RuntimeError(f"[gloo/transport/tcp/pair.cc:538] {RESET}"), 2, True, id="gloo"),
        pytest.param(dist.DistBackendError("NCCL: remote process exited"), 2, True, id="nccl"),
        pytest.param(dist.DistNetworkError("failed to recv"), 2, True, id="store"),
        pytest.param(RuntimeError(RESET), 1, False, id="one rank"),
        pytest.param(ConnectionResetError(104, RESET), 2, False, id="a server"),
        pytest.param(None, 2, False, id="no error"),
    ],
)
def test_lost_peer_takes_errors_of_backends_with_several_ranks(monkeypatch, error, num_ranks, expected):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: num_ranks)
    assert failure.is_lost_peer(error) is failure.is_peer_failure(error) is expected


def test_sigterm_of_a_launcher_is_no_message_after_a_lost_peer(monkeypatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    ended = EndedBySignal(signal.SIGTERM)
    assert failure._report_of(ended, "program")[:2] == (143, f"program: {ended}")
    ended.__context__ = RuntimeError(RESET)
    assert failure._report_of(ended, "program")[:2] == (143, "")


def test_an_interrupt_and_the_end_of_a_run_are_a_line(outcomes):
    assert outcomes["an interrupt"].output == "program: interrupted\n"
    assert outcomes["no error"].output == "ended well\n" * 2


def test_the_cause_is_the_last_line_of_a_rank_that_its_launcher_ends(outcomes):
    told = outcomes["a launcher's signal"].output
    assert told.strip().endswith("ZeroDivisionError: integer division or modulo by zero") and "SIGTERM" not in told


# `megatron-peft train`, up to its first collective. torch reads the variable as it is imported: not before main.
LEFT_BEHIND = """
import sys, types
from megatron_peft.commands import train

def step(*_):
    import torch.distributed as dist, torch
    dist.barrier()
    dist.all_reduce(torch.zeros(1))

of = types.SimpleNamespace
sys.modules["megatron_peft.training.run"] = of(finetune=step)
world = of(distributed_backend="gloo", distributed_timeout_minutes=1)
config = of(parallel=world, training=of(exit_signal_handler=True), checkpoint=of(save=None, load=None))
train.run_file = lambda *_, **__: ""
train.run(of(values={"program": {}, "config": {}}, launch={}, config=lambda *_: config, program="p", command_line=[]))
"""


def _killed_after_the_start(meeting: dict[str, str]) -> None:
    """Its place in the world, to the end of a start, is all that is needed of the one that is killed."""
    os.environ.update(meeting)
    dist.init_process_group("gloo")
    dist.barrier()
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_rank_that_is_killed_is_one_line_on_the_others() -> None:
    """The first, which hosts the store. torch's own message is ninety lines of C++ frames."""
    meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    plain = {name: value for name, value in os.environ.items() if name != "TORCH_CPP_LOG_LEVEL"}
    environment = {**plain, **meeting, "PYTHONWARNINGS": "ignore", "RANK": "1", "LOCAL_RANK": "1"}
    command = [sys.executable, "-c", LEFT_BEHIND]
    with Ranks(1, _killed_after_the_start, meeting) as first:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds(120))
        assert first.exit_codes == [-signal.SIGKILL] and done.returncode == 1
    lines = f"{done.stdout}{done.stderr}".splitlines()
    told = [line for line in lines if "No CUDA runtime is found" not in line]  # of torch's CUDA build without a GPU
    assert len(told) == 1, told
    assert "rank 1 lost its connection to another rank" in told[0]


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
