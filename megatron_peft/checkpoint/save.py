"""Writing a checkpoint: into a draft, then published at once. An earlier one is never touched before that."""

import dataclasses
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from megatron_peft.checkpoint.fingerprint import fingerprint
from megatron_peft.checkpoint.folders import (
    RECORD,
    iteration_folder,
    keep_last,
    publish,
    start_draft,
    write_atomically,
)
from megatron_peft.checkpoint.manifest import FileSum
from megatron_peft.checkpoint.parameters import adapted_layers, sharded_parameters
from megatron_peft.checkpoint.random_state import random_tensors
from megatron_peft.checkpoint.record import ADAPTER_CONFIG, RunRecord
from megatron_peft.checkpoint.resumable import Resumable
from megatron_peft.checkpoint.state import optimizer_steps, optimizer_tensors
from megatron_peft.checkpoint.tensors import PlannedFiles, Sharded, Written, parts
from megatron_peft.config import ConfigurationError
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
