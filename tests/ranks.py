"""Run a function on several ranks, each a process of its own, and collect what it returns.

`run_ranks(2, "tests.training.layout_runs:train_all", argument)` starts two processes that join a world of two and call
the function with the argument. Importing torch and megatron-core takes seconds a process: let one call do many checks.
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

from megatron_peft.runtime.launch import free_port

ROOT = Path(__file__).resolve().parent.parent


class RanksFailed(AssertionError):
    """Some rank exited with an error; the text is what the ranks printed."""


def run_ranks(num_ranks: int, target: str, argument: Any = None, timeout: float = 300) -> list[Any]:
    """Results by rank of `module:function` called with `argument` (both sides are pickled)."""
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
    }
    with open(Path(folder, f"output{rank}"), "wb") as output:
        command = [sys.executable, "-m", "tests.ranks", target, folder]
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output)


def _wait(processes: list[subprocess.Popen], timeout: float, folder: str) -> None:
    give_up = time.monotonic() + timeout
    while any(process.poll() is None for process in processes):
        failed = any(process.poll() for process in processes)
        if failed or time.monotonic() > give_up:
            time.sleep(1)
            for process in processes:
                process.kill()
        time.sleep(0.05)
    if any(process.returncode for process in processes):
        outputs = [Path(folder, f"output{rank}").read_text(errors="replace")[-4000:] for rank in range(len(processes))]
        raise RanksFailed("\n".join(f"--- rank {rank}\n{text}" for rank, text in enumerate(outputs)))


def _main(target: str, folder: str) -> None:
    import torch

    torch.set_num_threads(1)
    module, _, function = target.partition(":")
    argument = pickle.loads(Path(folder, "argument").read_bytes())
    result = getattr(importlib.import_module(module), function)(argument)
    Path(folder, f"result{os.environ['RANK']}").write_bytes(pickle.dumps(result))


if __name__ == "__main__":
    _main(*sys.argv[1:])
