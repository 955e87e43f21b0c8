"""SIGTERM and SIGUSR1 ask a run to save and exit after the step that it is in."""

from __future__ import annotations

import signal
from types import FrameType

SAVE_AND_EXIT = (signal.SIGTERM, signal.SIGUSR1)


class ExitSignals:
    """Remembers whether one of the signals came; a context manager that gives the old handlers back.

    Args:
        enabled: --exit-signal-handler. Without it the signals keep their meaning.
    """

    def __init__(self, enabled: bool) -> None:
        self.received = False
        self._signals = SAVE_AND_EXIT if enabled else ()

    def __enter__(self) -> ExitSignals:
        self._before = {number: signal.signal(number, self._remember) for number in self._signals}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = True
