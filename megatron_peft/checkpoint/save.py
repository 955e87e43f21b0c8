"""Writing a checkpoint: into a draft, then published at once. An earlier one is never touched before that."""

import dataclasses
import datetime
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from megatron_peft.checkpoint.folders import (
    RECORD,
    TRACKER,
    FileSum,
    FolderLock,
    is_checkpoint,
    iteration_folder,
    keep_last,
    newest_checkpoint,
    publish,
    remove_leftovers,
    start_draft,
    write_atomically,
)
from megatron_peft.checkpoint.record import ADAPTER_CONFIG, RunRecord, fingerprint
from megatron_peft.checkpoint.state import Resumable, optimizer_steps, optimizer_tensors, random_tensors
from megatron_peft.checkpoint.tensors import PlannedFiles, Sharded, Written, adapted_layers, parts, sharded_parameters
from megatron_peft.config import CheckpointConfig, ConfigurationError, require
from megatron_peft.parallel.collectives import from_first_rank
from megatron_peft.runtime.launch import checked_together

logger = logging.getLogger(__name__)


class CheckpointNotSaved(ConfigurationError):
    """A checkpoint could not be written, on any rank. Raised on all; the earlier ones and the run are whole."""


@dataclasses.dataclass(frozen=True)
class DraftedCheckpoint:
    """A checkpoint that is decided on and not yet written."""

    folder: Path
    draft: Path
    files: PlannedFiles
    record: RunRecord
    group: dist.ProcessGroup | None

    @property
    def iteration(self) -> int:
        return self.record.position["iteration"]

    def complete(self) -> Path:
        """Write this rank's files; when all ranks have, the first one publishes. A collective of `group`.

        Returns:
            The checkpoint, `<save>/iter_0000050`, now the newest.

        Raises:
            CheckpointNotSaved: on every rank; what was there before is untouched, and the draft is gone.
        """
        with _failures_told(self.folder, self.iteration, self.draft):
            own = checked_together(self.files.write, self.group)
            is_first = dist.get_rank() == 0
            by_rank: list[Written] | None = [own] * dist.get_world_size() if is_first else None
            dist.gather_object(own, by_rank, dst=0, group=self.group)
            from_first_rank(lambda: self._publish(by_rank or []), self.group)
        return iteration_folder(self.folder, self.iteration)

    def _publish(self, by_rank: Sequence[Written]) -> None:
        self.files.finish(by_rank)
        adapter_config = self.record.adapter_config() if self.record.config.peft.trains_adapters else None
        (self.draft / RECORD).write_text(self.record.to_json())
        if adapter_config:
            (self.draft / ADAPTER_CONFIG).write_text(adapter_config)
        known: dict[str, FileSum] = {name: found for written in by_rank for name, found in written.sums.items()}
        publish(self.draft, self.folder, self.iteration, known)
        if adapter_config:
            _write_beside_checkpoints(self.folder / ADAPTER_CONFIG, adapter_config)
        num_kept = self.record.config.checkpoint.keep_last_checkpoints
        if num_kept is not None:
            keep_last(self.folder, self.iteration, num_kept)


def _write_beside_checkpoints(path: Path, text: str) -> None:
    """The checkpoint is published and holds this text itself: without room for a copy it is saved all the same."""
    try:
        write_atomically(path, text)
    except OSError as error:
        logger.warning("%s cannot be written: %s", path, error)


def draft_checkpoint(
    state: Resumable, snapshot: bool = False, group: dist.ProcessGroup | None = None
) -> DraftedCheckpoint:
    """Begin a checkpoint of the state as it is now; `complete` writes it. A collective.

    Adapters only for adapter methods, the whole model for full fine-tuning; with the optimizer, the schedule, the
    generators and the position.

    Args:
        snapshot: copy what is to be saved, so that the run may go on before the files are written.
        group: all ranks, by which they agree later on; one of its own (gloo) if `complete` runs in a thread.

    Raises:
        CheckpointNotSaved: on every rank.
    """
    assert state.config.checkpoint.save is not None
    folder, iteration = Path(state.config.checkpoint.save), state.position.iteration
    chunks = [chunk.module for chunk in state.model_chunks]
    entries = sharded_parameters(chunks, only_adapters=state.config.peft.trains_adapters)
    record = _run_record(state, adapted_layers(chunks), entries)
    with _failures_told(folder, iteration):
        draft = from_first_rank(lambda: start_draft(folder, iteration))
    with _failures_told(folder, iteration, draft):
        files = PlannedFiles(_tensors(state, entries), draft, snapshot)
    return DraftedCheckpoint(folder, draft, files, record, group)


@contextmanager
def _failures_told(folder: Path, iteration: int, draft: Path | None = None) -> Iterator[None]:
    """Of what all ranks raise together. The draft is removed."""
    try:
        yield
    except ConfigurationError as error:
        if dist.get_rank() == 0 and draft is not None:
            shutil.rmtree(draft, ignore_errors=True)
        raise CheckpointNotSaved(
            f"--save {folder}: iteration {iteration} was not saved: {error}. What was saved before is untouched: "
            f"make room there, or give another --save."
        ) from error


def _tensors(state: Resumable, entries: Sequence[Sharded]) -> list[ShardedTensor]:
    settings = state.config.checkpoint
    tensors = [part for entry in entries for part in parts(entry)]
    if not settings.no_save_optim:
        tensors += optimizer_tensors(state.optimizer, entries)
    if not settings.no_save_rng:
        tensors += random_tensors()
    return tensors


def _run_record(state: Resumable, layers: tuple[str, ...], entries: Sequence[Sharded]) -> RunRecord:
    saves_optimizer = not state.config.checkpoint.no_save_optim
    return RunRecord(
        config=state.config,
        shape=state.shape,
        position=dataclasses.asdict(state.position),  # type: ignore[call-overload]
        adapted_layers=layers,
        base_fingerprint=base_fingerprint(state.config.model.pretrained_checkpoint),
        schedule=state.schedule.state_dict() if saves_optimizer else None,
        optimizer_steps=optimizer_steps(state.optimizer, entries) if saves_optimizer else None,
        data_digest=state.data_digest,
    )


def base_fingerprint(folder: str | None) -> Mapping[str, str] | None:
    """Of the base model, on the first rank; None elsewhere, and where it cannot be read (a lost base loses no run)."""
    if dist.get_rank() != 0 or folder is None:
        return None
    try:
        return fingerprint(folder)
    except OSError as error:
        logger.warning("the base model %s cannot be read any more, so it is not checked: %s", folder, error)
        return None


# The checkpoints of one run: its lock on the folder, saves at once or in the background, and how each came out.
#
# With --async-save a save copies what it needs and the run goes on; a thread of each rank writes the files, agrees with
# the others through a group of its own, and the first rank publishes. One save is under way at a time.

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
        self._folder = Path(settings.save or "")
        self._lock: FolderLock | None = None
        self._executor: ThreadPoolExecutor | None = None
        self._group: dist.ProcessGroup | None = None
        self._pending: tuple[int, Future[Any]] | None = None
        if settings.save is not None:
            from_first_rank(lambda: self._take(settings.load, settings.finetune))
        if settings.save is not None and settings.async_save:
            self._executor = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
            self._group = dist.new_group(backend="gloo", timeout=_GROUP_TIMEOUT)  # type: ignore[assignment]

    def start(self, state: Resumable) -> None:
        """Save the state as it is now: write it before returning, or copy it and write it in the background.

        `finish` tells how it came out, and must have been called for the save before.

        Raises:
            ConfigurationError: on every rank: the folder was moved away, and another run's is in its place.
        """
        assert self._pending is None, "a save is under way"
        iteration = state.position.iteration
        try:
            if trouble := from_first_rank(self._trouble_with_the_folder):
                raise CheckpointNotSaved(trouble)
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

    def hold_folder(self) -> None:
        """On the first rank: take the folder anew if somebody has moved or removed it; elsewhere nothing.

        Raises:
            ConfigurationError: by now another run saves there, or has.
            OSError: it cannot be made again.
        """
        before = self._lock
        if before is None or before.is_in_place:
            return
        try:
            self._take(str(self._folder) if before.is_of_the_same_folder else None, grace_seconds=0.0)
        except ConfigurationError as error:
            raise ConfigurationError(
                f"--save {self._folder} was moved or removed during the run, and another run has that folder now: this "
                f"one ends, and has replaced nothing there. Go on from where its folder is now, with --save and --load."
            ) from error
        before.release()

    def _trouble_with_the_folder(self) -> str:
        """What may pass, so that a later save succeeds; the run goes on."""
        try:
            self.hold_folder()
        except OSError as error:
            return f"--save {self._folder} cannot be made again: {error}."
        return ""

    def _take(self, load: str | None, finetune: bool = False, **lock_settings: float) -> None:
        lock = FolderLock(self._folder, **lock_settings)
        try:
            if lock.is_held and self._lock is None:
                remove_leftovers(self._folder)
            _refuse_another_run(self._folder, load, finetune)
        except ConfigurationError:
            lock.release()
            raise
        self._lock = lock

    def _submit(self, complete: Callable[[], Path]) -> Future[Any]:
        if self._executor is not None:
            return self._executor.submit(complete)
        done: Future[Any] = Future()
        done.set_result(complete())
        return done


def _refuse_another_run(folder: Path, load: str | None, finetune: bool) -> None:
    """A folder of checkpoints is that of one run: a new one would replace them by its own, and their metrics."""
    loads = Path(load).resolve() if load and not finetune else None
    goes_on = loads is not None and folder.resolve() == (loads.parent if is_checkpoint(loads) else loads)
    newest = newest_checkpoint(folder)
    found = newest.name if newest else f"{TRACKER} names one" * (folder / TRACKER).is_file()
    require(
        goes_on or not found,
        f"--save {folder} holds the checkpoints of a run already (the newest: {found}), which a new run would replace: "
        f"give another --save; or, to go on with that run, --load {folder}"
        + (" without --finetune." if finetune and load else "."),
    )


def _failed(error: CheckpointNotSaved) -> Future[Any]:
    failed: Future[Any] = Future()
    failed.set_exception(error)
    return failed
