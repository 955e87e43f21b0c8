"""Run a function on several ranks of this machine, each a process of its own, and collect what it returns.

Like torchrun, for benchmarks and tests. The processes have the environment of a world, which the function may join.
They are forks of one server, which may have the slow imports (seconds a process) behind it: see `preload`.
"""

import gc
import multiprocessing
import os
import pickle
import secrets
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

# Ranks share the cores: with a second OpenMP thread a forward took 14 times longer under load.
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
_ALONE = {**ONE_THREAD, "PYTHONWARNINGS": "ignore", "CUDA_VISIBLE_DEVICES": ""}
_SECONDS_FOR_LAST_WORDS = 1.0
_server = multiprocessing.get_context("forkserver")
NO_GPU = "megatron_peft.runtime.no_gpu"  # first of all that the server imports: ranks compute on the CPU by design
_preloaded: list[str] = []
_server.set_forkserver_preload([NO_GPU])  # by default the server imports the main program


class RanksFailed(RuntimeError):
    """Some rank exited with an error, or all took too long; the text is what the ranks printed."""


class WorkerKilled(RuntimeError):
    """By a signal; mostly by the kernel, for the memory that it took."""


def preload(modules: Sequence[str]) -> None:
    """Let the server import these before the first rank is forked; only a process's first call has an effect.

    Only modules that start no threads and touch no device on import: ranks inherit them.
    """
    os.environ.update(ONE_THREAD)  # torch reads them once, on import
    if not _preloaded:
        _preloaded.extend(modules)
        _server.set_forkserver_preload([NO_GPU, *modules])


def run_ranks(num_ranks: int, function: Callable[[Any], Any], argument: Any = None, timeout: float = 300) -> list[Any]:
    """What `function(argument)` returned, by rank (both are pickled, so it is a function of a module).

    Raises RanksFailed if a rank failed, or `timeout` seconds were up.
    """
    with Ranks(num_ranks, function, argument) as ranks:
        ranks.wait(timeout)
        if any(ranks.exit_codes):
            raise RanksFailed("\n".join(f"--- rank {rank}\n{ranks.output(rank)[-4000:]}" for rank in range(num_ranks)))
        return [ranks.result(rank) for rank in range(num_ranks)]


class Ranks:
    """A world that runs `function(argument)` on each rank, for callers that look at it while it runs or as it fails.

    Used as a context manager: at its end no rank is left, and neither is what they wrote.
    """

    def __init__(self, num_ranks: int, function: Callable[[Any], Any], argument: Any = None) -> None:
        self._folder = tempfile.TemporaryDirectory()
        # The function stays pickled until the environment is set: to load it imports torch.
        call = pickle.dumps((function, argument))
        meeting = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(num_ranks)}
        shared = {**os.environ, **_ALONE, **meeting}
        environments = [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(num_ranks)]
        self.processes = [
            _server.Process(target=_rank, args=(environment, call, self._folder.name)) for environment in environments
        ]

    def __enter__(self) -> "Ranks":
        for process in self.processes:
            process.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._kill()
        self._folder.cleanup()

    @property
    def exit_codes(self) -> list[int | None]:
        """The negative number of the signal that ended a rank, None while it runs."""
        return [process.exitcode for process in self.processes]

    def output(self, rank: int) -> str:
        """What the rank has printed so far, errors too."""
        path = Path(self._folder.name, f"output{rank}")
        return path.read_text(errors="replace") if path.exists() else ""

    def result(self, rank: int) -> Any:
        """What the function returned on a rank."""
        return pickle.loads(Path(self._folder.name, f"result{rank}").read_bytes())

    def wait(self, timeout: float) -> None:
        """Until all have ended; when one fails or the time is up, the others have a second to say why."""
        give_up = time.monotonic() + timeout
        while running := [process.sentinel for process in self.processes if process.exitcode is None]:
            ended = wait(running, timeout=max(give_up - time.monotonic(), 0))
            if not ended or any(self.exit_codes):
                time.sleep(_SECONDS_FOR_LAST_WORDS)
                self._kill()

    def _kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def free_port() -> int:
    """A TCP port that is free now, below the range of ephemeral ports."""
    while True:
        port = secrets.choice(range(10_000, 32_000))
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("localhost", port))
            return port


def _rank(environment: dict[str, str], call: bytes, folder: str) -> None:
    """The life of a rank."""
    rank = environment["RANK"]
    _begin(environment, Path(folder, f"output{rank}"))
    try:
        function, argument = pickle.loads(call)
        Path(folder, f"result{rank}").write_bytes(pickle.dumps(function(argument)))
    except Exception:
        traceback.print_exc()
        raise SystemExit(1) from None
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _begin(environment: dict[str, str], output: Path) -> None:
    """What a process does first: it prints to the file `output`."""
    if not output.parent.exists():  # nobody waits for it any more: the program has ended
        raise SystemExit
    os.environ.clear()
    os.environ.update(environment)
    gc.freeze()  # what the server has imported stays: to collect it would copy its memory
    file = os.open(output, os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    import_module(NO_GPU)  # where another server than ours forks


class Worker:
    """A process that answers one call after another, until it is ended or this program ends."""

    def __init__(self) -> None:
        self.connection, theirs = _server.Pipe()
        self._folder = tempfile.TemporaryDirectory()
        self._output = Path(self._folder.name, "output")
        environment = {**os.environ, **_ALONE}
        self._process = _server.Process(target=_work, args=(theirs, environment, self._output), daemon=True)
        self._process.start()
        theirs.close()

    def ask(self, call: Callable[[], Any]) -> None:
        """`answer` gives what it returns, once `connection` can be read; both are pickled."""
        with suppress(ConnectionError):  # it has died, and `answer` says so
            self.connection.send(call)

    def answer(self, name: str) -> Any:
        """RuntimeError: the call has failed, with what it has printed; `name` says what it was. WorkerKilled is one."""
        try:
            return self.connection.recv()
        except (EOFError, OSError):
            self._process.join()
            said = self._output.read_text(errors="replace") if self._output.exists() else ""
            code = self._process.exitcode
            kind = WorkerKilled if code and code < 0 else RuntimeError
            raise kind(f"{name} failed ({code}):\n{said}") from None

    def end(self) -> None:
        """Whatever it does."""
        self._process.kill()
        self._process.join()
        self.connection.close()
        self._folder.cleanup()


def _work(connection: Connection, environment: dict[str, str], output: Path) -> None:
    """The life of a worker. An error ends it."""
    _begin(environment, output)
    while True:
        try:
            call = connection.recv()
        except EOFError:  # the program has ended
            return
        connection.send(call())
