"""One failure ends all ranks, with one message, at once.

A rank that fails alone would leave the others waiting in a collective until the distributed timeout. Instead the first
rank to fail writes to a board in the rendezvous store and prints its message; a thread on every other rank looks at
the board twice a second and ends its process.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from collections.abc import Callable

import torch.distributed as dist

from megatron_peft.config import ConfigurationError

CONFIGURATION_ERROR_EXIT_CODE = 2
_LOOK_SECONDS = 0.5
_FAREWELL_SECONDS = 5.0


def run_together(main: Callable[[], None], program: str) -> None:
    """Run `main` in a started world. When it raises on one rank, every rank's process ends with the same exit code.

    2 for a ConfigurationError, printed without a traceback; 1 for anything else. A process group that is waiting in a
    collective cannot be torn down, so failing processes end without clean-up.

    Args:
        main: the program.
        program: its name, put before the message.
    """
    board = _FailureBoard()
    try:
        main()
    except ConfigurationError as error:
        board.fail(CONFIGURATION_ERROR_EXIT_CODE, f"{program}: error: {error}")
    except Exception:  # noqa: BLE001 - whatever it is, the other ranks must not wait for this one
        board.fail(1, f"{program}: rank {dist.get_rank()} failed:\n{traceback.format_exc()}")
    board.close()


class _FailureBoard:
    """The first failure of the world, kept in the rendezvous store."""

    def __init__(self) -> None:
        self._closed = threading.Event()
        self._world_size = int(os.environ["WORLD_SIZE"])
        if self._world_size == 1:
            return
        store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self._store = dist.PrefixStore(f"megatron_peft/failure/{attempt}", store)
        threading.Thread(target=self._watch, daemon=True).start()

    def fail(self, exit_code: int, message: str) -> None:
        """End this process; print `message` if no other rank was first. Never returns."""
        self._closed.set()
        if self._is_first(exit_code):
            print(message, file=sys.stderr, flush=True)
            self._wait_for_the_others()
        _exit(exit_code)

    def close(self) -> None:
        """Stop looking: the program ended well."""
        self._closed.set()

    def _is_first(self, exit_code: int) -> bool:
        if self._world_size == 1:
            return True
        first = self._store.add("failures", 1) == 1
        if first:
            self._store.set("exit_code", str(exit_code))
        return first

    def _wait_for_the_others(self) -> None:
        """A launcher kills the remaining ranks when one exits; give them the time to end with the right code."""
        give_up = time.monotonic() + _FAREWELL_SECONDS
        while self._world_size > 1 and time.monotonic() < give_up:
            if self._store.add("ended", 0) >= self._world_size - 1:
                return
            time.sleep(_LOOK_SECONDS / 5)

    def _watch(self) -> None:
        while not self._closed.wait(_LOOK_SECONDS):
            try:
                failed = self._store.check(["exit_code"])
            except dist.DistError:  # the store went with the rank that hosted it
                if not self._closed.is_set():
                    _exit(1)
                return
            if failed:
                exit_code = int(self._store.get("exit_code"))
                self._store.add("ended", 1)
                _exit(exit_code)


def _exit(exit_code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)
