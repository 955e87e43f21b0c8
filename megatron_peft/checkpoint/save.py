"""Writing a checkpoint: into a draft, then published at once. An earlier one is never touched before that."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_peft.checkpoint.fingerprint import fingerprint
from megatron_peft.checkpoint.folders import (
    ADAPTER_CONFIG,
    RECORD,
    iteration_folder,
    publish,
    start_draft,
    write_atomically,
)
from megatron_peft.checkpoint.optimizer_state import optimizer_steps, optimizer_tensors
from megatron_peft.checkpoint.parameters import adapted_layers, sharded_parameters
from megatron_peft.checkpoint.random_state import random_tensors
from megatron_peft.checkpoint.record import RunRecord
from megatron_peft.checkpoint.resumable import Resumable
from megatron_peft.checkpoint.sharded_files import Sharded, parts, write_tensors
from megatron_peft.config import ConfigurationError
from megatron_peft.runtime.launch import checked_together

logger = logging.getLogger(__name__)


class CheckpointNotSaved(ConfigurationError):
    """A checkpoint could not be written, on any rank. Raised on all; the earlier ones and the run are whole."""


def save_checkpoint(state: Resumable) -> Path:
    """Write the run's state under --save and make it the newest checkpoint. A collective.

    Adapters only for adapter methods, the whole model for full fine-tuning; with the optimizer, the schedule, the
    generators and the position.

    Returns:
        The checkpoint, `<save>/iter_0000050`.

    Raises:
        CheckpointNotSaved: on every rank; what was there before is untouched, and the draft is gone.
    """
    assert state.config.checkpoint.save is not None
    folder, iteration = Path(state.config.checkpoint.save), state.position.iteration
    chunks = [chunk.module for chunk in state.model_chunks]
    entries = sharded_parameters(chunks, only_adapters=state.config.peft.trains_adapters)
    record = _run_record(state, adapted_layers(chunks), entries)
    draft: Path | None = None
    try:
        draft = checked_together(lambda: _on_first_rank(start_draft, folder, iteration))
        draft = _told_by_first_rank(draft)
        write_tensors(_tensors(state, entries), draft)
        checked_together(lambda: _on_first_rank(_publish, draft, folder, iteration, record))
    except ConfigurationError as error:
        if dist.get_rank() == 0 and draft is not None:
            shutil.rmtree(draft, ignore_errors=True)
        raise CheckpointNotSaved(
            f"--save {folder}: iteration {iteration} was not saved: {error}. What was saved before is untouched: "
            f"make room there, or give another --save."
        ) from error
    return iteration_folder(folder, iteration)


def _tensors(state: Resumable, entries: Sequence[Sharded]) -> list:
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


def _publish(draft: Path, folder: Path, iteration: int, record: RunRecord) -> None:
    (draft / RECORD).write_text(record.to_json())
    if record.config.peft.trains_adapters:
        (draft / ADAPTER_CONFIG).write_text(record.adapter_config())
    publish(draft, folder, iteration)
    if record.config.peft.trains_adapters:
        write_atomically(folder / ADAPTER_CONFIG, record.adapter_config())


def _on_first_rank(action: Any, *arguments: Any) -> Any:
    """Call it on rank 0; an OSError becomes the ConfigurationError that all ranks agree on."""
    if dist.get_rank() != 0:
        return None
    try:
        return action(*arguments)
    except OSError as error:
        raise ConfigurationError(str(error)) from error


def _told_by_first_rank(draft: Path | None) -> Path:
    told: list[Any] = [draft]
    dist.broadcast_object_list(told, src=0)
    return told[0]
