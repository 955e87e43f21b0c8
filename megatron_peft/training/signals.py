"""SIGINT (Ctrl-C), SIGTERM and SIGUSR1 ask a run to save and exit after the step that it is in."""

import os
import signal
from types import FrameType

SAVE_AND_EXIT = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class ExitSignals:
    """Remembers whether one of the signals came; a context manager that gives the old handlers back.

    Args:
        enabled: --exit-signal-handler. Without it the signals keep their meaning.
        speaks: whether this process says so at the terminal.
    """

    def __init__(self, enabled: bool, speaks: bool = False) -> None:
        self.received = False
        self._speaks = speaks
        self._signals = SAVE_AND_EXIT if enabled else ()

    def __enter__(self) -> "ExitSignals":
        self._before = {number: signal.signal(number, self._remember) for number in self._signals}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self._speaks and not self.received:
            # Not print: the signal may have come while the stream was being written.
            os.write(2, f"\n{signal.Signals(number).name}: ending after this step (Ctrl-\\ ends at once)\n".encode())
        self.received = True
