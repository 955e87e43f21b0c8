"""When one rank fails, all ranks end at once, with one message.

Otherwise the other ranks would wait in a collective until the distributed timeout. The first rank to fail prints its
message and writes to the rendezvous store, which a thread on every other rank polls twice a second.
"""

import datetime
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

import torch.distributed as dist

from megatron_peft.config import ConfigurationError, print_failure

CONFIGURATION_ERROR_EXIT_CODE = 2
INTERRUPTED_EXIT_CODE = 128 + signal.SIGINT
LOST_CONNECTION = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")
STORE_TIMEOUT = datetime.timedelta(seconds=60)  # its host may have ended; torch's default is five minutes
LEAVE_TIMEOUT_SECONDS = 10.0  # a killed rank never reports that it leaves
_POLL_SECONDS = 0.5


def run_together(main: Callable[[], None], program: str) -> None:
    """Run `main` in a started world. When it raises on one rank, all processes end with the same exit code, without
    clean-up (a process group that waits in a collective cannot be destroyed).

    The exit code is 2 for a ConfigurationError, 130 for Ctrl-C and 1 for anything else. Only the latter prints a
    traceback, unless it is a FloatingPointError (a loss that is not finite).

    Args:
        main: the program.
        program: its name, the prefix of the message.
    """
    board = _FailureBoard()
    try:
        main()
        board.close()
    except ConfigurationError as error:
        board.fail(CONFIGURATION_ERROR_EXIT_CODE, f"{program}: error: {error}")
    except KeyboardInterrupt:
        board.fail(INTERRUPTED_EXIT_CODE, f"{program}: interrupted")
    except FloatingPointError as error:  # the message of a training step is enough
        board.fail(1, f"{program}: error: {error}")
    except Exception as error:  # noqa: BLE001 - whatever it is, the other ranks must not wait for this one
        # torch's own message for a lost connection is ninety lines of C++ frames, on each rank that waits.
        rank = dist.get_rank()
        if isinstance(error, dist.DistNetworkError) or any(text in str(error) for text in LOST_CONNECTION):
            board.fail(
                1,
                f"{program}: rank {rank} lost its connection to another rank: that one was killed, or its node failed.",
            )
        board.fail(1, f"{program}: rank {rank} failed:\n{traceback.format_exc()}")


class _FailureBoard:
    """The first failure of the world, in the rendezvous store (torchrun's, else rank 0's)."""

    def __init__(self) -> None:
        self._closed = threading.Event()
        self._leaving = threading.Lock()
        self._world_size = dist.get_world_size()
        if self._world_size == 1:
            return
        store = dist.TCPStore(
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=STORE_TIMEOUT
        )
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self._store = dist.PrefixStore(f"megatron_peft/failure/{attempt}", store)
        threading.Thread(target=self._watch, daemon=True).start()

    def close(self) -> None:
        """Wait for the other ranks, then stop polling: the store may end with the first rank that leaves."""
        dist.barrier()
        self._closed.set()

    def fail(self, exit_code: int, message: str) -> NoReturn:
        """End this process with all others; print `message` unless another rank failed first."""
        self._closed.set()
        if self._world_size == 1:
            _exit_with(message, exit_code)
        try:
            if self._store.add("failures", 1) > 1:
                self._leave(int(self._store.get("exit_code")))
        except dist.DistError:  # the rank that hosted the store has ended
            _exit_with(message, exit_code)
        print_failure(message)
        with suppress(dist.DistError):
            self._store.set("exit_code", str(exit_code))
        self._leave(exit_code)

    def _watch(self) -> None:
        while not self._closed.wait(_POLL_SECONDS):
            try:
                failed = self._store.check(["exit_code"])
            except dist.DistError:  # the rank that hosted the store has ended
                if not self._closed.wait(_POLL_SECONDS):  # the main thread may be about to print a better message
                    _exit_with(f"rank {dist.get_rank()}: rank 0 is gone: it was killed, or its node failed.", 1)
                return
            if failed and not self._closed.is_set():
                self._leave(int(self._store.get("exit_code")))

    def _leave(self, exit_code: int) -> NoReturn:
        """Exit when all ranks are ready: when one process ends, a launcher kills the others, which changes their exit
        codes.
        """
        self._leaving.acquire()  # only one of this process's two threads leaves
        give_up = time.monotonic() + LEAVE_TIMEOUT_SECONDS
        try:
            self._store.add("leaving", 1)
            while self._store.add("leaving", 0) < self._world_size and time.monotonic() < give_up:
                time.sleep(_POLL_SECONDS / 5)
        except dist.DistError:
            pass  # the rank that hosted the store saw all others leave, and has ended
        if dist.get_rank() == 0:
            time.sleep(_POLL_SECONDS)  # it may host the store that the others poll
        _exit(exit_code)


def _exit_with(message: str, exit_code: int) -> NoReturn:
    print_failure(message)
    _exit(exit_code)


def _exit(exit_code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)
