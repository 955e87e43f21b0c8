"""The checkpoints of one run: its lock on the folder, saves at once or in the background, and how each came out.

With --async-save a save copies what it needs and the run goes on; a thread of each rank writes the files, agrees with
the others through a group of its own, and the first rank publishes. One save is under way at a time.
"""

import datetime
import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as dist

from megatron_peft.checkpoint.folder_lock import FolderLock
from megatron_peft.checkpoint.folders import TRACKER, newest_checkpoint, remove_leftovers
from megatron_peft.checkpoint.resumable import Resumable
from megatron_peft.checkpoint.save import CheckpointNotSaved, draft_checkpoint
from megatron_peft.config import CheckpointConfig, ConfigurationError, require
from megatron_peft.parallel.collectives import from_first_rank

logger = logging.getLogger(__name__)

# Ranks may differ by this much in how long they write. One that dies is noticed at once.
_GROUP_TIMEOUT = datetime.timedelta(hours=6)


@dataclass(frozen=True)
class Outcome:
    """Of a save that is over: the same on all ranks. `error` is None if the checkpoint was published."""

    iteration: int
    error: CheckpointNotSaved | None


class Saver:
    """Takes the --save folder for this run; a context manager that completes a pending save and gives the folder back.

    Making it and `start` are collectives. Without --save it must not be asked to save.

    Raises:
        ConfigurationError: on every rank: another run is saving there, or has saved there and is not the one that
            goes on, or the folder cannot be written.
    """

    def __init__(self, settings: CheckpointConfig) -> None:
        self._lock: FolderLock | None = None
        self._executor: ThreadPoolExecutor | None = None
        self._group: dist.ProcessGroup | None = None
        self._pending: tuple[int, Future[Any]] | None = None
        if settings.save is not None:
            from_first_rank(lambda: self._take(settings))
        if settings.save is not None and settings.async_save:
            self._executor = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
            self._group = dist.new_group(backend="gloo", timeout=_GROUP_TIMEOUT)  # type: ignore[assignment]

    def start(self, state: Resumable) -> None:
        """Save the state as it is now: write it before returning, or copy it and write it in the background.

        `finish` tells how it came out, and must have been called for the save before.
        """
        assert self._pending is None, "a save is under way"
        iteration = state.position.iteration
        try:
            draft = draft_checkpoint(state, snapshot=self._executor is not None, group=self._group)
            self._pending = iteration, self._submit(draft.complete)
        except CheckpointNotSaved as error:
            self._pending = iteration, _failed(error)

    def finish(self, wait: bool = True) -> Outcome | None:
        """How the save that was started came out; None if there is none, or if it is not over and we do not wait."""
        if self._pending is None or not (wait or self._pending[1].done()):
            return None
        (iteration, save), self._pending = self._pending, None
        error = save.exception()
        if error is not None and not isinstance(error, CheckpointNotSaved):
            raise error
        return Outcome(iteration, error)

    def __enter__(self) -> "Saver":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            outcome = self.finish()
            if outcome is not None and outcome.error is not None:
                logger.error("%s", outcome.error)
        except Exception as failure:
            if error is None:
                raise
            logger.error("the pending checkpoint is lost: %s", failure)  # and the run ends with its own error
        finally:
            if self._executor is not None:
                self._executor.shutdown()
            if self._lock is not None:
                self._lock.release()

    def _take(self, settings: CheckpointConfig) -> None:
        assert settings.save is not None
        folder = Path(settings.save)
        self._lock = FolderLock(folder)
        if self._lock.is_held:
            remove_leftovers(folder)
        try:
            _refuse_another_run(settings, folder)
        except ConfigurationError:
            self._lock.release()
            raise

    def _submit(self, complete: Callable[[], Path]) -> Future[Any]:
        if self._executor is not None:
            return self._executor.submit(complete)
        done: Future[Any] = Future()
        done.set_result(complete())
        return done


def _refuse_another_run(settings: CheckpointConfig, folder: Path) -> None:
    """A folder of checkpoints is that of one run: a new one would replace them by its own, and their metrics."""
    loads = Path(settings.load).resolve() if settings.load and not settings.finetune else None
    goes_on = loads is not None and folder.resolve() in (loads, loads.parent)
    newest = newest_checkpoint(folder)
    found = newest.name if newest else f"{TRACKER} names one" * (folder / TRACKER).is_file()
    require(
        goes_on or not found,
        f"--save {folder} holds the checkpoints of a run already (the newest: {found}), which a new run would replace: "
        f"give another --save; or, to go on with that run, --load {folder}"
        + (" without --finetune." if settings.finetune and settings.load else "."),
    )


def _failed(error: CheckpointNotSaved) -> Future[Any]:
    failed: Future[Any] = Future()
    failed.set_exception(error)
    return failed
