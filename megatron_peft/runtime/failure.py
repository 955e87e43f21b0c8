"""One failure ends all ranks, with one message, at once.

A rank that fails alone would leave the others waiting in a collective until the distributed timeout. Instead the first
rank to fail prints its message and writes to a board in the rendezvous store; a thread on every other rank looks at the
board twice a second, and all processes end together.
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

from megatron_peft.config import ConfigurationError

CONFIGURATION_ERROR_EXIT_CODE = 2
INTERRUPTED_EXIT_CODE = 128 + signal.SIGINT
LOST_CONNECTION = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")
STORE_TIMEOUT = datetime.timedelta(seconds=60)  # its host may be gone already; torch tries for five minutes
FAREWELL_SECONDS = 10.0  # a rank that was killed never says that it leaves
_LOOK_SECONDS = 0.5


def run_together(main: Callable[[], None], program: str) -> None:
    """Run `main` in a started world. When it raises on one rank, every rank's process ends with the same exit code.

    2 for a ConfigurationError, 130 for Ctrl-C and 1 for anything else, which alone is told with a traceback (but for a
    FloatingPointError, a loss that is not finite). A process group that is waiting in a collective cannot be torn down,
    so failing processes end without clean-up.

    Args:
        main: the program.
        program: its name, put before the message.
    """
    board = _FailureBoard()
    try:
        main()
        board.all_ended_well()
    except ConfigurationError as error:
        board.fail(CONFIGURATION_ERROR_EXIT_CODE, f"{program}: error: {error}")
    except KeyboardInterrupt:
        board.fail(INTERRUPTED_EXIT_CODE, f"{program}: interrupted")
    except FloatingPointError as error:  # a step's: its message says it all
        board.fail(1, f"{program}: error: {error}")
    except Exception as error:  # noqa: BLE001 - whatever it is, the other ranks must not wait for this one
        rank = dist.get_rank()
        if _is_lost_connection(error):
            board.fail(
                1,
                f"{program}: rank {rank} lost its connection to another rank: that one was killed, or its node failed.",
            )
        board.fail(1, f"{program}: rank {rank} failed:\n{traceback.format_exc()}")


def _is_lost_connection(error: Exception) -> bool:
    """torch's own message is ninety lines of C++ frames, on each rank that waits for the one that is gone."""
    text = str(error)
    return isinstance(error, dist.DistNetworkError) or any(sign in text for sign in LOST_CONNECTION)


class _FailureBoard:
    """The first failure of the world, kept in the rendezvous store (torchrun's, or else rank 0's)."""

    def __init__(self) -> None:
        self._closed = threading.Event()
        self._door = threading.Lock()
        self._world_size = dist.get_world_size()
        if self._world_size == 1:
            return
        store = dist.TCPStore(
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=STORE_TIMEOUT
        )
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self._store = dist.PrefixStore(f"megatron_peft/failure/{attempt}", store)
        threading.Thread(target=self._watch, daemon=True).start()

    def all_ended_well(self) -> None:
        """Wait for the other ranks, then stop looking: the store may be gone with the first rank to leave."""
        dist.barrier()
        self._closed.set()

    def fail(self, exit_code: int, message: str) -> NoReturn:
        """End this process with all others; print `message` if no other rank was first."""
        self._closed.set()
        if self._world_size == 1:
            _exit_with(message, exit_code)
        try:
            if self._store.add("failures", 1) > 1:
                self._leave(int(self._store.get("exit_code")))
        except dist.DistError:  # the store went with the rank that hosted it
            _exit_with(message, exit_code)
        print(message, file=sys.stderr, flush=True)
        with suppress(dist.DistError):
            self._store.set("exit_code", str(exit_code))
        self._leave(exit_code)

    def _watch(self) -> None:
        while not self._closed.wait(_LOOK_SECONDS):
            try:
                failed = self._store.check(["exit_code"])
            except dist.DistError:  # the store went with the rank that hosted it
                if not self._closed.wait(_LOOK_SECONDS):  # the main thread may be about to tell it better
                    _exit_with(f"rank {dist.get_rank()}: rank 0 is gone: it was killed, or its node failed.", 1)
                return
            if failed and not self._closed.is_set():
                self._leave(int(self._store.get("exit_code")))

    def _leave(self, exit_code: int) -> NoReturn:
        """End when all ranks are about to. A launcher kills what remains when one ends, whatever its exit code."""
        self._door.acquire()  # of this process's two threads, one leaves
        give_up = time.monotonic() + FAREWELL_SECONDS
        try:
            self._store.add("leaving", 1)
            while self._store.add("leaving", 0) < self._world_size and time.monotonic() < give_up:
                time.sleep(_LOOK_SECONDS / 5)
        except dist.DistError:
            pass  # the rank that hosted the store saw all others and has left
        if dist.get_rank() == 0:
            time.sleep(_LOOK_SECONDS)  # it may host the store that the others are looking at
        _exit(exit_code)


def _exit_with(message: str, exit_code: int) -> NoReturn:
    print(message, file=sys.stderr, flush=True)
    _exit(exit_code)


def _exit(exit_code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)
