"""Save a checkpoint: every rank writes into a draft folder, which is then published atomically."""

import dataclasses
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from megatron_peft.checkpoint import folders, tensors
from megatron_peft.checkpoint.run_record import ADAPTER_CONFIG, RunRecord, fingerprint
from megatron_peft.checkpoint.state import (
    TrainingState,
    optimizer_tensors,
    random_tensors,
    schedule_state,
    steps_of,
    whole_parameters,
)
from megatron_peft.checkpoint.tensors import RankFiles, Sharded, Written, complete_files, global_slices
from megatron_peft.config import CheckpointConfig, ConfigurationError, require
from megatron_peft.parallel.collectives import from_first_rank, gathered_by_first_rank
from megatron_peft.runtime.failure import is_peer_failure
from megatron_peft.runtime.launch import device_setter, gloo_group

logger = logging.getLogger(__name__)


class CheckpointNotSaved(ConfigurationError):
    """A rank could not write its share of a checkpoint. Raised on all ranks; earlier checkpoints are untouched."""

    on_all_ranks = True


@dataclasses.dataclass(frozen=True)
class DraftedCheckpoint:
    """A checkpoint that is ready to be written."""

    folder: Path
    draft: Path
    files: RankFiles
    record: RunRecord
    group: dist.ProcessGroup | None

    @property
    def iteration(self) -> int:
        """The iteration whose state it holds."""
        return self.record.position["iteration"]

    def complete(self) -> Path:
        """Write this rank's files; when all have, the first publishes. Returns the checkpoint. A collective.

        Raises CheckpointNotSaved, on every rank: earlier checkpoints are untouched, and the draft is removed.
        """
        with _as_not_saved(self.folder, self.iteration, self.draft):
            gathered_by_first_rank(self.files.write, self._publish, self.group)
        return folders.iteration_folder(self.folder, self.iteration)

    def _publish(self, by_rank: Sequence[Written]) -> None:
        sums = complete_files(self.draft, by_rank)
        adapter_config = self.record.adapter_config() if self.record.config.peft.trains_adapters else None
        (self.draft / folders.RECORD).write_text(self.record.to_json())
        if adapter_config:
            (self.draft / ADAPTER_CONFIG).write_text(adapter_config)
        folders.publish(self.draft, self.folder, self.iteration, sums)
        # The checkpoint is saved. What follows only warns if it fails.
        if adapter_config:
            beside = self.folder / ADAPTER_CONFIG
            try:
                folders.write_atomically(beside, adapter_config)
            except OSError as error:
                logger.warning("%s cannot be written: %s", beside, error)
        if self.best_iteration is not None:
            folders.link_best(self.folder, self.best_iteration)

    @property
    def best_iteration(self) -> int | None:
        """That of the lowest validation loss, with --keep-best."""
        best = self.record.best
        return best.iteration if self.record.config.checkpoint.keep_best and best.loss is not None else None


def draft_checkpoint(
    state: TrainingState, snapshot: bool = False, group: dist.ProcessGroup | None = None
) -> DraftedCheckpoint:
    """A checkpoint of the current state; `complete` writes it. A collective.

    snapshot: copy the state, so that the run may go on before the files are written.
    group: `gloo_group`, for `complete` in a thread beside the main one.
    Raises CheckpointNotSaved on every rank.
    """
    assert state.config.checkpoint.save is not None
    folder, iteration = Path(state.config.checkpoint.save), state.position.iteration
    entries = state.entries
    record = record_of(state, tensors.adapted_layers(state.model_chunks), entries)
    with _as_not_saved(folder, iteration):
        draft = from_first_rank(lambda: folders.start_draft(folders.iteration_folder(folder, iteration)))
    with _as_not_saved(folder, iteration, draft), whole_parameters(state.model_chunks):
        files = RankFiles(tensors_to_save(state, entries), draft, snapshot)
    return DraftedCheckpoint(folder, draft, files, record, group)


@contextmanager
def _as_not_saved(folder: Path, iteration: int, draft: Path | None = None) -> Iterator[None]:
    """Turn an error that all ranks raise into CheckpointNotSaved, and remove the draft."""
    try:
        yield
    except ConfigurationError as error:
        if dist.get_rank() == 0 and draft is not None:
            shutil.rmtree(draft, ignore_errors=True)
        raise CheckpointNotSaved(
            f"--save {folder}: iteration {iteration} was not saved: {error}. Earlier checkpoints are intact: "
            f"free disk space, or use another --save folder."
        ) from error


def tensors_to_save(state: TrainingState, entries: Sequence[Sharded]) -> list[ShardedTensor]:
    """This rank's tensors of a checkpoint: parameters, optimizer and generators, as far as they are saved."""
    settings = state.config.checkpoint
    saved = [tensor for entry in entries for tensor in global_slices(entry)]
    if not settings.no_save_optim:
        saved += optimizer_tensors(state.optimizer, entries)
    if not settings.no_save_rng:
        saved += random_tensors()
    return saved


def record_of(state: TrainingState, layers: tuple[str, ...], entries: Sequence[Sharded]) -> RunRecord:
    """What a checkpoint of now says of the run: of its adapted layers, and with the optimizer's steps of `entries`."""
    config, base = state.config, state.config.model.pretrained_checkpoint
    # Whoever reads the record may be in another folder.
    model = dataclasses.replace(config.model, pretrained_checkpoint=_absolute(base))
    files = {name: _absolute(getattr(config.data, name)) for name in ("tokenizer_model", "chat_template")}
    config = dataclasses.replace(config, model=model, data=dataclasses.replace(config.data, **files))
    saves_optimizer = not config.checkpoint.no_save_optim
    return RunRecord(
        config=config,
        shape=state.shape,
        position=dataclasses.asdict(state.position),
        adapted_layers=layers,
        base_fingerprint=base_fingerprint(base),
        schedule=schedule_state(state.schedule) if saves_optimizer else None,
        optimizer_steps=steps_of(state.optimizer, entries) if saves_optimizer else None,
        data_digest=state.data_digest,
        tokenizer_digest=state.tokenizer_digest,
        best=state.best,
        longest_sample=state.longest_sample,
    )


def _absolute(name: str | None) -> str | None:
    """The absolute path of what is here; a name of the Hub and the text of a chat template stay."""
    return str(Path(name).absolute()) if name and os.path.exists(name) else name


def base_fingerprint(folder: str | None) -> Mapping[str, str] | None:
    """Fingerprint of the base model on the first rank, None on the others.

    Also None, with a warning, if the base cannot be read any more: a run must not end for that.
    """
    if dist.get_rank() != 0 or folder is None:
        return None
    try:
        return fingerprint(folder)
    except OSError as error:
        logger.warning("the base model %s cannot be read any more, so it is not checked: %s", folder, error)
        return None


# A folder of tensors alone, for loops that are not ours.


def write_new_folder(written: Sequence[ShardedTensor], folder: Path) -> None:
    """Write a folder that does not exist yet, whole or not at all, with a manifest. A collective.

    Raises ConfigurationError, on every rank: the folder exists, or cannot be written.
    """

    def start() -> Path:
        require(not folder.exists(), f"{folder} exists already: give a folder that does not.")
        return folders.start_draft(folder)

    draft = from_first_rank(start)
    try:
        files = RankFiles(written, draft)

        def finish(by_rank: Sequence[Written]) -> None:
            sums = complete_files(draft, by_rank)
            folders.write_manifest(draft, sums)
            folders.publish_draft(draft, folder, sums)

        gathered_by_first_rank(files.write, finish)
    except ConfigurationError:
        if dist.get_rank() == 0:
            shutil.rmtree(draft, ignore_errors=True)
        raise


# With --async-save a save copies the tensors and the run continues; a thread on each rank writes the files. The threads
# agree over a gloo group, since training uses the others, and rank 0 publishes. In another thread rank 0 removes old
# checkpoints.


@dataclasses.dataclass(frozen=True)
class SaveOutcome:
    """Result of a save, the same on all ranks. `error` is None if the checkpoint was published."""

    iteration: int
    error: CheckpointNotSaved | None


class Saver:
    """Locks the --save folder and writes the run's checkpoints. On exit it completes a pending save and unlocks.

    The constructor and `start` are collectives. Without --save, `start` must not be called.

    Raises ConfigurationError, on every rank: another run is saving there; or another run has saved there, and --load
    does not resume it; or the folder cannot be written.
    """

    def __init__(self, settings: CheckpointConfig) -> None:
        self._folder = Path(settings.save or "")
        self._lock: folders.FolderLock | None = None
        self._executor: ThreadPoolExecutor | None = None
        self._group: dist.ProcessGroup | None = None
        self._remover = ThreadPoolExecutor(1, thread_name_prefix="removal")
        self._pending: tuple[int, Future[Any]] | None = None
        if settings.save is None:
            return
        from_first_rank(lambda: self._take(settings.load, settings.finetune))
        if settings.async_save:
            self._executor = ThreadPoolExecutor(1, thread_name_prefix="checkpoint", initializer=device_setter())
            self._group = gloo_group()

    def start(self, state: TrainingState) -> None:
        """Save the current state: write it before returning or, with --async-save, copy it and write in a thread.

        `finish` returns the outcome. It must have been called for the previous save.
        Raises ConfigurationError, on every rank: the folder was moved away, and another run's is in its place.
        """
        assert self._pending is None, "a save is under way"
        save: Future[Any] = Future()
        try:
            if problem := from_first_rank(self._folder_problem):
                raise CheckpointNotSaved(problem)
            draft = draft_checkpoint(state, snapshot=self._executor is not None, group=self._group)
            if self._executor is None:
                save.set_result(self._complete(draft))
            else:
                save = self._executor.submit(self._complete, draft)
        except CheckpointNotSaved as error:
            save.set_exception(error)
        self._pending = state.position.iteration, save

    def _complete(self, draft: DraftedCheckpoint) -> None:
        draft.complete()
        num_kept = draft.record.config.checkpoint.keep_last_checkpoints
        if num_kept is not None and dist.get_rank() == 0:
            self._remover.submit(folders.keep_last, self._folder, draft.iteration, num_kept, draft.best_iteration)

    def finish(self, wait: bool = True) -> SaveOutcome | None:
        """Return the outcome of the last `start`; None if there was none, or without `wait` if it is still under way.

        Raises what the thread raised, for instance because it has lost another rank.
        """
        if self._pending is None or not (wait or self._pending[1].done()):
            return None
        (iteration, save), self._pending = self._pending, None
        error = save.exception()
        if error is not None and not isinstance(error, CheckpointNotSaved):
            raise error
        return SaveOutcome(iteration, error)

    def __enter__(self) -> "Saver":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        is_lost = is_peer_failure(error)  # what that rank has not written yet never comes
        try:
            outcome = None if is_lost else self.finish()
            if outcome is not None and outcome.error is not None:
                logger.error("%s", outcome.error)
        except Exception as failure:
            if error is None:
                raise
            logger.error("the pending checkpoint is lost: %s", failure)  # the run raises its own error
        finally:
            if self._executor is not None:
                self._executor.shutdown(wait=not is_lost)
            self._remover.shutdown(wait=error is None)  # else the other ranks wait for this one's message
            if self._lock is not None:
                self._lock.release()

    def hold_folder(self) -> None:
        """Make and lock the folder again if somebody has moved or removed it. Does nothing except on the first rank.

        Raises ConfigurationError: another run saves there by now, or has saved there.
        Raises OSError: the folder cannot be made.
        """
        before = self._lock
        if before is None or before.is_in_place:
            return
        try:
            self._take(str(self._folder) if before.is_of_the_same_folder else None, grace_seconds=0.0)
        except ConfigurationError as error:
            raise ConfigurationError(
                f"--save {self._folder} was moved or removed during the run, and another run has that folder now: this "
                f"one ends, and has replaced nothing there. Resume it from where its folder is now: --save and --load."
            ) from error
        before.release()

    def _folder_problem(self) -> str:
        """A problem that a later save may not have, so that the run continues; an empty string without one."""
        try:
            self.hold_folder()
        except OSError as error:
            return f"--save {self._folder} cannot be recreated: {error}."
        return ""

    def _take(self, load: str | None, finetune: bool = False, **lock_settings: float) -> None:
        """Lock the folder, which belongs to one run: another would replace its checkpoints and metrics."""
        folder = self._folder
        lock = folders.FolderLock(folder, **lock_settings)
        try:
            if lock.is_held and self._lock is None:
                folders.remove_leftovers(folder)
            folders.require_own(folder, load, finetune)
        except ConfigurationError:
            lock.release()
            raise
        self._lock = lock
