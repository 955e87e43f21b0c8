"""Events in a run: saves that fail on purpose and write nothing; a signal; a full disk."""

import os
import resource
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from megatron_peft.checkpoint.save import CheckpointNotSaved, SaveOutcome


class RecordedSaves:
    """Every save is over at once, or with `late` when it is waited for; `failing` attempts, counted from 0, fail."""

    def __init__(self, failing: Collection[int] = (), late: bool = False) -> None:
        self.saved: list[int] = []
        self.attempts: list[int] = []
        self._failing, self._late = failing, late
        self._pending: SaveOutcome | None = None

    def start(self, state: Any) -> None:
        assert self._pending is None, "the save before was not finished"
        iteration = state.position.iteration
        fails = len(self.attempts) in self._failing
        self.attempts.append(iteration)
        self._pending = SaveOutcome(iteration, CheckpointNotSaved("No space left on device.") if fails else None)

    def finish(self, wait: bool = True) -> SaveOutcome | None:
        if self._late and not wait:
            return None
        outcome, self._pending = self._pending, None
        if outcome is not None and outcome.error is None:
            self.saved.append(outcome.iteration)
        return outcome

    def hold_folder(self) -> None:
        """Nobody moves it."""


def signal_at(batches: Any, first_sample: int, number: int) -> None:
    """This process gets the signal as the step that begins with this sample of training or validation data is built."""
    step_at = batches.step_at

    def killing_step_at(first: int) -> Any:
        if first == first_sample:
            os.kill(os.getpid(), number)
        return step_at(first)

    batches.step_at = killing_step_at


def signal_in_forward(state: Any, iteration: int, number: int) -> None:
    """Send this process the signal in the forward of the step that follows `iteration` finished ones."""

    def kill(module: Any, inputs: Any) -> None:
        if state.position.iteration == iteration:
            os.kill(os.getpid(), number)

    state.model_chunks[0].register_forward_pre_hook(kill)


@contextmanager
def small_files_only(num_bytes: int) -> Iterator[None]:
    """The kernel refuses to let a file of this process grow further."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
