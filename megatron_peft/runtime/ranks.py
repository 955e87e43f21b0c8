"""Run a function on several ranks of this machine, each a process of its own, and collect what it returns.

`run_ranks(2, "package.module:function", argument)` starts two processes with the environment of a world of two; the
function may join it. Benchmarks and tests use it: a torchrun whose ranks answer. Importing megatron-core takes
seconds a process, so let one call do much.
"""

from __future__ import annotations

import importlib
import os
import pickle
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

_LOOK_SECONDS = 0.05
_FAREWELL_SECONDS = 1.0


class RanksFailed(RuntimeError):
    """Some rank exited with an error, or all took too long; the text is what the ranks printed."""


def run_ranks(num_ranks: int, target: str, argument: Any = None, timeout: float = 300) -> list[Any]:
    """Results by rank of `module:function` called with `argument` (both sides are pickled).

    Args:
        num_ranks: processes, one thread each.
        timeout: seconds until the ranks are stopped.

    Raises:
        RanksFailed: a rank failed or the time was up.
    """
    from megatron_peft.runtime.launch import free_port  # here, so that a rank imports what its function needs, no more

    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "argument").write_bytes(pickle.dumps(argument))
        port = free_port()
        processes = [_start(rank, num_ranks, target, folder, port) for rank in range(num_ranks)]
        _wait(processes, timeout, folder)
        return [pickle.loads(Path(folder, f"result{rank}").read_bytes()) for rank in range(num_ranks)]


def _start(rank: int, num_ranks: int, target: str, folder: str, port: int) -> subprocess.Popen:
    environment = {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "PYTHONWARNINGS": "ignore",
        "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
    }
    with open(Path(folder, f"output{rank}"), "wb") as output:
        command = [sys.executable, "-m", "megatron_peft.runtime.ranks", target, folder]
        return subprocess.Popen(command, env=environment, stdout=output, stderr=output)


def _wait(processes: list[subprocess.Popen], timeout: float, folder: str) -> None:
    give_up = time.monotonic() + timeout
    while any(process.poll() is None for process in processes):
        failed = any(process.poll() for process in processes)
        if failed or time.monotonic() > give_up:
            time.sleep(_FAREWELL_SECONDS)
            for process in processes:
                process.kill()
        time.sleep(_LOOK_SECONDS)
    if any(process.returncode for process in processes):
        outputs = [Path(folder, f"output{rank}").read_text(errors="replace")[-4000:] for rank in range(len(processes))]
        raise RanksFailed("\n".join(f"--- rank {rank}\n{text}" for rank, text in enumerate(outputs)))


def _main(target: str, folder: str) -> None:
    module, _, function = target.partition(":")
    argument = pickle.loads(Path(folder, "argument").read_bytes())
    result = getattr(importlib.import_module(module), function)(argument)
    Path(folder, f"result{os.environ['RANK']}").write_bytes(pickle.dumps(result))


if __name__ == "__main__":
    _main(*sys.argv[1:])
