"""Run a function on several ranks of this machine, each a process of its own, and collect what it returns.

`run_ranks(2, function, argument)` starts two processes with the environment of a world of two; the function may join
it. Benchmarks and tests use it: a torchrun whose ranks answer. The processes are forks of one server, which may have
the slow imports (torch, megatron-core: seconds a process) behind it: see `preload`.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

# Ranks share the cores: with a second OpenMP thread a forward took 14 times longer under load.
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
_SECONDS_FOR_LAST_WORDS = 1.0
_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload([])  # by default the server imports the main program


class RanksFailed(RuntimeError):
    """Some rank exited with an error, or all took too long; the text is what the ranks printed."""


def preload(modules: Sequence[str]) -> None:
    """Let the server import these before the first rank is forked; later calls have no effect.

    Only what neither starts threads nor touches a device on import: ranks inherit it as it is.
    """
    os.environ.update(ONE_THREAD)  # torch reads them once, on import
    _server.set_forkserver_preload(list(modules))


def run_ranks(num_ranks: int, function: Callable[[Any], Any], argument: Any = None, timeout: float = 300) -> list[Any]:
    """What `function(argument)` returned, by rank (both are pickled, so it is a function of a module).

    Args:
        num_ranks: processes, one thread each.
        timeout: seconds until the ranks are stopped.

    Raises:
        RanksFailed: a rank failed or the time was up.
    """
    from megatron_peft.runtime.launch import free_port  # here, so that a rank imports what its function needs, no more

    # The function stays pickled until the environment is set: to load it imports torch.
    call = pickle.dumps((function, argument))
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        ranks = [
            _server.Process(target=_rank, args=(_environment(rank, num_ranks, port), call, folder))
            for rank in range(num_ranks)
        ]
        for rank in ranks:
            rank.start()
        _wait(ranks, timeout, folder)
        return [pickle.loads(Path(folder, f"result{rank}").read_bytes()) for rank in range(num_ranks)]


def _environment(rank: int, num_ranks: int, port: int) -> dict[str, str]:
    here = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_ranks)}
    meeting = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    return {**os.environ, **ONE_THREAD, "PYTHONWARNINGS": "ignore", **here, **meeting}


def _wait(ranks: list[ForkServerProcess], timeout: float, folder: str) -> None:
    """Until all have ended; when one fails or the time is up, the others have a second to say why."""
    give_up = time.monotonic() + timeout
    while running := [rank.sentinel for rank in ranks if rank.exitcode is None]:
        ended = wait(running, timeout=max(give_up - time.monotonic(), 0))
        if not ended or any(rank.exitcode for rank in ranks):
            time.sleep(_SECONDS_FOR_LAST_WORDS)
            for rank in ranks:
                rank.kill()
                rank.join()
    if any(rank.exitcode for rank in ranks):
        outputs = [Path(folder, f"output{rank}") for rank in range(len(ranks))]
        texts = [output.read_text(errors="replace")[-4000:] if output.exists() else "" for output in outputs]
        raise RanksFailed("\n".join(f"--- rank {rank}\n{text}" for rank, text in enumerate(texts)))


def _rank(environment: dict[str, str], call: bytes, folder: str) -> None:
    """The life of a rank."""
    os.environ.clear()
    os.environ.update(environment)
    rank = environment["RANK"]
    output = os.open(Path(folder, f"output{rank}"), os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    try:
        function, argument = pickle.loads(call)
        Path(folder, f"result{rank}").write_bytes(pickle.dumps(function(argument)))
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        raise SystemExit(1) from None
