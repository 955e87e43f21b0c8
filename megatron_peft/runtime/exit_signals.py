"""SIGINT, SIGTERM and SIGUSR1: during training they are remembered until the step is done, before it they end the run.

A scheduler sends them when time is up or the job is preempted, and that may be while weights are loaded. Without torch:
the handlers must be there before it is imported. SIGPIPE, which Python ignores, is a BrokenPipeError.
"""

import os
import select
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SAVE_AND_EXIT = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
CLOSED_OUTPUT = 128 + signal.SIGPIPE  # exit code of a shell's pipeline for a program whose reader has left


class EndedBySignal(KeyboardInterrupt):
    """SIGTERM or SIGUSR1 came where nothing had to be saved. The exit code is a shell's: 128 + the signal."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.exit_code = 128 + number

    def __str__(self) -> str:
        name = signal.Signals(self.exit_code - 128).name
        return f"{name} while no step was running: the run ends, and nothing is lost"


@contextmanager
def ends_before_training(enabled: bool) -> Iterator[None]:
    """Inside, except within `ExitSignals`, SIGTERM and SIGUSR1 raise EndedBySignal, as SIGINT raises KeyboardInterrupt.

    Unless --exit-signal-handler is `enabled`, signals act as usual.
    """

    def end(number: int, frame: FrameType | None) -> None:
        raise EndedBySignal(number)

    numbers = (signal.SIGTERM, signal.SIGUSR1) if enabled else ()
    _before.update({number: signal.signal(number, end) for number in numbers})
    try:
        yield
    finally:
        _restore()


# A worker that is forked meanwhile gets the former handlers back, so that SIGTERM ends it: a handler in Python would
# look which process it is in, but does not run before a worker wakes that the signal reaches as it falls asleep.

_before: dict[int, Any] = {}  # number -> handler


def _restore() -> None:
    while _before:
        signal.signal(*_before.popitem())


os.register_at_fork(after_in_child=_restore)


class ExitSignals:
    """Records whether one of the signals arrived; a context manager that restores the old handlers.

    enabled: --exit-signal-handler. Without it signals act as usual.
    prints: whether this process confirms a signal at the terminal.
    """

    def __init__(self, enabled: bool, prints: bool = False) -> None:
        self.received = False
        self._prints = prints
        self._signals = SAVE_AND_EXIT if enabled else ()

    def __enter__(self) -> "ExitSignals":
        self._before = {number: signal.signal(number, self._remember) for number in self._signals}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        # Not after SIGTERM, which a launcher also sends where another rank has failed; and not by `print`, since the
        # signal may have interrupted a write to the same stream.
        if self._prints and not self.received and number != signal.SIGTERM:
            os.write(2, f"\n{signal.Signals(number).name}: ending after this step (Ctrl-\\ ends at once)\n".encode())
        self.received = True


def is_output_closed() -> bool:
    """Return True if the reader of standard output or standard error, such as `head`, has left."""
    poll = select.poll()
    for descriptor in (1, 2):
        poll.register(descriptor, 0)  # errors alone
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


@contextmanager
def ends_with_reader() -> Iterator[None]:
    """Exit quietly, as Unix tools do, if the reader of standard output leaves before everything is written."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        if not is_output_closed():
            raise
        # The interpreter flushes both once more when it ends, and would report the same error.
        for stream in (sys.stdout, sys.stderr):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        raise SystemExit(CLOSED_OUTPUT) from None
