"""A failure on any rank ends all of them, soon, with one exit code and one message; the tests' launcher tells it."""

import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from multiprocessing.connection import wait
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
from megatron_peft.runtime.launch import name_in_store
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


def _print_without_reader() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, 1)
    print("a line", flush=True)


class Case(NamedTuple):
    """What is raised or done on which ranks of how many, and what becomes of it."""

    does: Exception | Callable[[], None] | None
    failing: list[int]
    size: int
    exit_code: int
    told: str


CASES = {
    "configuration on one": Case(WRONG, [2], 3, 2, "program: error: --lr is wrong."),
    "error on one": Case(LOST, [1], 2, 1, "program: rank 1 failed:"),
    "error on the first": Case(LOST, [0], 2, 1, "program: rank 0 failed:"),
    "on all": Case(NonFiniteError("iteration 3: NaN."), [0, 1], 2, 1, "program: error: iteration 3: NaN."),
    "an interrupt": Case(_interrupt, [0], 1, 130, "program: interrupted"),
    "a launcher's signal": Case(_fail_and_be_signalled, [0], 1, 1, "program: rank 0 failed:"),
    "a closed pipe": Case(BrokenPipeError(32, "Broken pipe"), [0], 1, 1, "program: rank 0 failed:"),
    "no reader": Case(_print_without_reader, [0], 2, 141, ""),
    "no error": Case(None, [], 2, 0, "ended well"),
}


def _program(case: Case) -> None:
    """The ranks that do not fail wait in a collective, as in a step."""
    rank = dist.get_rank()
    if case.does is None:
        time.sleep(0.7 * rank)  # longer than the others poll the store
    elif rank not in case.failing:
        dist.all_reduce(torch.zeros(1))
    elif isinstance(case.does, Exception):
        print(f"raised at {time.time()}", flush=True)
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
    exit_codes: list[int | None]
    output: str
    ended_at: float


@pytest.fixture(scope="module")
def outcomes() -> dict[str, Outcome]:
    """Of all cases, which run side by side; no rank is ended from outside."""
    with ExitStack() as stack:
        worlds = {case: stack.enter_context(Ranks(CASES[case].size, _rank, case)) for case in CASES}
        running = {process.sentinel: case for case, ranks in worlds.items() for process in ranks.processes}
        ended_at, give_up = {}, time.monotonic() + seconds(120)
        while running:
            ended = wait([*running], timeout=max(give_up - time.monotonic(), 0))
            assert ended, f"ranks never ended: {[*running.values()]}"
            ended_at |= {running.pop(sentinel): time.time() for sentinel in ended}
        outputs = {case: "".join(map(ranks.output, range(len(ranks.processes)))) for case, ranks in worlds.items()}
        return {case: Outcome(worlds[case].exit_codes, outputs[case], ended_at[case]) for case in CASES}


@pytest.mark.parametrize("case", CASES)
def test_all_ranks_end_with_one_exit_code_and_one_message(outcomes, case):
    found, (_, _, size, exit_code, told) = outcomes[case], CASES[case]
    assert found.exit_codes == [exit_code] * size, found.output
    assert found.output.count(told) == (1 if exit_code else size) if told else not found.output, found.output
    is_told_with_its_place = told.endswith("failed:")  # other messages are enough
    assert found.output.count("Traceback") == is_told_with_its_place
    assert found.output.count("RuntimeError: lost") == case.startswith("error"), found.output


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
def test_lost_a_rank_takes_errors_of_backends_with_several_ranks(monkeypatch, error, num_ranks, expected):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: num_ranks)
    assert failure.lost_a_rank(error) is failure.waits_in_vain(error) is expected


def test_no_rank_waits_for_a_timeout(outcomes):
    for case, found in outcomes.items():
        raised_at = [float(text) for text in re.findall(r"raised at ([\d.]+)", found.output)]
        assert not raised_at or found.ended_at - max(raised_at) < seconds(LEAVE_TIMEOUT_SECONDS), case


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
    dist.barrier()  # both have opened the store
    dist.all_reduce(torch.zeros(1))

of = types.SimpleNamespace
sys.modules["megatron_peft.training.run"] = of(finetune=step)
world = of(distributed_backend="gloo", distributed_timeout_minutes=1)
config = of(parallel=world, training=of(exit_signal_handler=True), checkpoint=of(save=None, load=None))
train.run_file = lambda *_, **__: ""
train.run(of(values={"program": {}, "config": {}}, launch={}, config=lambda *_: config, program="p", command_line=[]))
"""


def _killed(meeting: dict[str, str]) -> None:
    """Its place in the world, to the end of a start, is all that is needed of the one that is killed."""
    os.environ.update(meeting)
    dist.init_process_group("gloo")
    name_in_store()
    for _ in range(2):
        dist.barrier()
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_rank_that_is_killed_is_one_line_on_the_others() -> None:
    """The first hosts the store: what the others want to tell one another has nowhere to go."""
    meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    plain = {name: value for name, value in os.environ.items() if name != "TORCH_CPP_LOG_LEVEL"}
    environment = {**plain, **meeting, "PYTHONWARNINGS": "ignore", "RANK": "1", "LOCAL_RANK": "1"}
    command = [sys.executable, "-c", LEFT_BEHIND]
    with Ranks(1, _killed, meeting) as first:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds(120))
        assert first.exit_codes == [-signal.SIGKILL] and done.returncode == 1
    lines = f"{done.stdout}{done.stderr}".splitlines()
    told = [line for line in lines if "No CUDA runtime is found" not in line]  # of torch's CUDA build without a GPU
    assert len(told) == 1, told
    assert re.search("rank 1 lost its connection to another rank|rank 0 is gone", told[0])


def _connections(stale_seconds: float) -> tuple[int, bool]:
    """How often this rank connects to the store in a run that ends well, and whether its node's folder is left."""
    dist.init_process_group("gloo")
    connected, plain = [], dist.TCPStore
    failure.dist.TCPStore = lambda *place, **settings: (connected.append(place), plain(*place, **settings))[1]
    failure.STALE_SECONDS = stale_seconds
    run_together(lambda: time.sleep(3 * failure._POLL_SECONDS), "program")
    dist.barrier()
    return len(connected), failure.folder_on_node().exists()


@pytest.mark.parametrize(("stale_seconds", "expected"), [(60.0, [1, 0, 0]), (0.0, [1, 1, 1])])
def test_a_nodes_first_rank_alone_watches_the_store_as_long_as_it_lives(stale_seconds, expected) -> None:
    assert run_ranks(3, _connections, seconds(stale_seconds)) == [(number, False) for number in expected]


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
