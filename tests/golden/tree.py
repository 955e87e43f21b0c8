"""One tree of the project, loaded once; it forks the ranks of every run.

`python tests/golden/tree.py ROOT` takes jobs, lines of JSON, on its standard input. It knows programs, not modules:
what a run of a program imported it imports itself before the next. So it serves trees of any commit.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

LIMIT_SECONDS = 120 * float(os.environ.get("MEGATRON_PEFT_TEST_TIME_FACTOR", "1"))
FAREWELL_SECONDS = 3.0  # for the other ranks to end when one has failed
LAST_LINES = 12
LIBRARIES = ("torch", "megatron.core", "transformers")  # loaded before the first run, once instead of by every rank
ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "",  # two ranks need two GPUs, and a GPU's sums are not the same bits twice
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "PYTHONWARNINGS": "ignore",
    "TQDM_DISABLE": "1",
}


class ProgramFailed(Exception):
    """A program ended with another exit code than 0, or was too slow; the text is its last lines."""


class Tree:
    """The working tree or a checkout, by its folder. A context manager; it runs one program at a time."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(self.root)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **ENVIRONMENT, "PYTHONPATH": str(self.root)},  # for processes that a program starts
            text=True,
            start_new_session=True,  # Ctrl-C reaches the caller alone, who ends this
        )

    def run(self, programs: Sequence[str], flags: Sequence[str], folder: Path, num_ranks: int = 1) -> str:
        """What all ranks print, of the first of `programs` that the tree has ("tools/convert.py": words may follow).

        Args:
            folder: where it runs; what it prints goes there too, into `log.txt`.

        Raises:
            ProgramFailed: with its last lines.
        """
        from megatron_peft.runtime.ranks import free_port  # here: run as a program, this file serves another tree

        has = [program.split() for program in programs if (self.root / program.split()[0]).is_file()]
        if not has:
            raise ProgramFailed(f"there is no {' or '.join(programs)}")
        file, words, log = has[0][0], [*has[0][1:], *flags], folder / "log.txt"
        job = {"file": file, "flags": words, "folder": str(folder), "num_ranks": num_ranks, "log": str(log)}
        job["meeting"] = {"MASTER_ADDR": "localhost", "MASTER_PORT": free_port()}
        assert self._process.stdin and self._process.stdout
        try:
            print(json.dumps(job), file=self._process.stdin, flush=True)
            failure = json.loads(self._process.stdout.readline())
        except (BrokenPipeError, ValueError) as error:
            raise ProgramFailed("the process that forks the ranks is gone") from error
        printed = log.read_text(errors="replace")
        if failure:
            last = "\n".join(printed.splitlines()[-LAST_LINES:])
            raise ProgramFailed(f"{file} {failure}:\n{last}\nIts flags: {' '.join(words)}")
        return printed

    def __enter__(self) -> Tree:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()  # it ends its ranks first
        self._process.wait()


def _serve(root: str) -> None:
    """Run jobs until there are no more."""
    sys.path[0] = root  # in front of an installed megatron_peft
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a module prints when it is imported is no answer
    for name in LIBRARIES:
        importlib.import_module(name)
    imported: dict[str, list[str]] = {}  # by a program's last run
    for line in sys.stdin:
        job = json.loads(line)
        names = Path(job["folder"], ".modules")
        _preload(imported.pop(job["file"], []), Path(root))
        failure = _run_world(job, names)
        if not failure:
            imported[job["file"]] = names.read_text().splitlines()
        print(json.dumps(failure), file=answers, flush=True)


def _preload(names: Sequence[str], root: Path) -> None:
    """Import what a rank has imported, so that the next one need not. A module that cannot be is left to it."""
    for name in [name for name in names if name not in sys.modules]:
        with contextlib.suppress(BaseException):
            importlib.import_module(name)
    assert threading.active_count() == 1, f"a thread would be lost in a fork: {threading.enumerate()}"
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if file and (root / name.partition(".")[0]).is_dir():
            assert Path(file).is_relative_to(root), f"{name} comes from {file} instead of {root}"


def _run_world(job: Mapping[str, Any], names: Path) -> str | None:
    """Fork the ranks and wait for them. None, or what went wrong."""
    Path(job["log"]).write_bytes(b"")
    running: dict[int, int] = {}  # process -> rank
    failure, give_up = None, time.monotonic() + LIMIT_SECONDS
    try:
        for rank in range(job["num_ranks"]):
            pid = os.fork()
            if pid == 0:
                _be_rank(job, rank, names)
            running[pid] = rank
        while running and time.monotonic() < give_up:
            for pid, rank in list(running.items()):
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    del running[pid]
                if ended and status and not failure:
                    failure = f"ended with {os.waitstatus_to_exitcode(status)} on rank {rank}"
                    give_up = time.monotonic() + FAREWELL_SECONDS
            time.sleep(0.005)
        return failure or (f"was not done after {LIMIT_SECONDS:.0f} s" if running else None)
    finally:
        for pid in running:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def _be_rank(job: Mapping[str, Any], rank: int, names: Path) -> NoReturn:
    """The rest of a forked process's life: the program, as if Python had been started for it."""
    code = 1
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        with open(os.devnull) as nothing, open(job["log"], "ab") as log:
            os.dup2(nothing.fileno(), 0)
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        os.chdir(job["folder"])
        world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": job["num_ranks"], **job["meeting"]}
        os.environ |= {name: str(value) for name, value in world.items()}
        sys.argv = [os.path.join(sys.path[0], job["file"]), *job["flags"]]
        runpy.run_path(sys.argv[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        print(end.code if isinstance(end.code, str) else "", end="", file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        if rank == 0 and code == 0:
            names.write_text("\n".join(sys.modules))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    try:
        _serve(sys.argv[1])
    except Exception:
        traceback.print_exc()
    finally:
        os._exit(0)  # the interpreter's own end takes long with so much loaded
