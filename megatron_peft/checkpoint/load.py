"""Resume from a checkpoint, or load its parameters only."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

from megatron_peft.checkpoint import run_record, tensors
from megatron_peft.checkpoint.folders import TRACKER, checkpoints, damage, newest_checkpoint, tracker_text
from megatron_peft.checkpoint.run_record import CurrentRun, RunRecord
from megatron_peft.checkpoint.save import base_fingerprint
from megatron_peft.checkpoint.state import (
    NOT_IN_STATE,
    TrainingState,
    optimizer_targets,
    random_targets,
    restore_random,
    schedule_state,
    set_steps,
)
from megatron_peft.config import CheckpointConfig, ConfigurationError, RunConfig, require
from megatron_peft.models.shape import ModelShape
from megatron_peft.parallel.collectives import from_first_rank
from megatron_peft.runtime.launch import checked_together, gather_over_world

logger = logging.getLogger(__name__)


def find_whole_checkpoint(folder: Path) -> Path | None:
    """The checkpoint to resume from, or None if there is none. Damaged ones are skipped with a warning. A collective.

    Raises ConfigurationError, on every rank, if there are checkpoints but none is whole (it names the damage), or if
    the tracker names a checkpoint that is missing.
    """
    problems: list[str] = []
    for checkpoint in from_first_rank(lambda: _candidates(folder)):
        if problem := _damage_on_all_ranks(checkpoint):
            problems.append(problem)
            continue
        if problems:
            _warn("WARNING: %s FALLING BACK to %s, the newest undamaged one.", " ".join(problems), checkpoint)
        return checkpoint
    if problems:
        raise ConfigurationError(
            f"--load {folder} holds no whole checkpoint: {' '.join(problems)} Copy the damaged files again, give "
            f"another --load, or start from the beginning without --load."
        )
    return None


def require_something_to_load(settings: CheckpointConfig) -> None:
    """Raises ConfigurationError if --load holds no checkpoint (most likely a typo). To be called on the first rank.

    The --save folder may be empty, so that the same command starts a run and resumes it.
    """
    if settings.load is None or _candidates(Path(settings.load)):
        return
    require(
        not settings.exit_on_missing_checkpoint,
        f"--load {settings.load} holds no checkpoint, and --exit-on-missing-checkpoint ends the run for that: give the "
        f"--save folder of a run, or leave the flag out to start from the beginning.",
    )
    load, save = (Path(name).resolve() if name else None for name in (settings.load, settings.save))
    require(
        load == save and not Path(settings.load).name.startswith("iter_"),
        f"--load {settings.load} holds no checkpoint: give the --save folder of a run, or a checkpoint in it. To start "
        f"from the beginning, leave out --load, or give the --save folder.",
    )


def resolve_resume(settings: CheckpointConfig) -> CheckpointConfig:
    """The settings with what --resume auto means now. To be called on the first rank.

    If --save holds a checkpoint, the run resumes from it, and --load (where the run once began) is not read again.
    """
    if settings.resume == "never" or not _candidates(Path(settings.save or "")):
        return settings
    return replace(settings, load=settings.save, finetune=False)


def check_resume(config: RunConfig, shape: ModelShape, schedule: Mapping[str, Any]) -> None:
    """Raises ConfigurationError, on every rank, if the newest record under --load contradicts this run. A collective.

    `load_checkpoint` compares again, with the adapted layers too, and with an older record if the newest is damaged.
    """
    settings = config.checkpoint

    def check() -> None:
        checkpoint = newest_checkpoint(Path(settings.load)) if settings.load and dist.get_rank() == 0 else None
        if checkpoint is None:
            return
        try:
            record = run_record.read_record(checkpoint)
        except ConfigurationError:
            return  # damaged: `load_checkpoint` goes back to an older one, or names the damage
        base = base_fingerprint(config.model.pretrained_checkpoint)
        _refuse(record, CurrentRun(config, shape, None, base, schedule), _resumes_optimizer(settings))

    checked_together(check)


def _resumes_optimizer(settings: CheckpointConfig) -> bool:
    return not (settings.finetune or settings.no_load_optim)


def _candidates(folder: Path) -> list[Path]:
    there, named = checkpoints(folder), tracker_text(folder)
    require(
        bool(there) or not named,
        f"--load {folder} holds no checkpoint of a run, but its {TRACKER} names {named}: copy it back; or, to start "
        f"from the beginning, remove the file. For a model of another program use --pretrained-checkpoint.",
    )
    return there


def require_whole(checkpoint: Path) -> None:
    """Raises ConfigurationError on every rank, with the files' names, if a checkpoint is damaged. A collective."""
    if problem := _damage_on_all_ranks(checkpoint):
        raise ConfigurationError(f"{problem} Copy it again, or give another checkpoint.")


def _damage_on_all_ranks(checkpoint: Path) -> str:
    """A sentence with what each rank's share of the files lacks; empty if all are whole. A collective."""
    own = checked_together(lambda: damage(checkpoint, dist.get_rank(), dist.get_world_size()))
    by_rank = gather_over_world(own)
    problems = dict.fromkeys(problem for problems in by_rank for problem in problems)
    return f"{checkpoint} is damaged: {'; '.join(problems)}." if problems else ""


def load_checkpoint(state: TrainingState) -> Path | None:
    """Resume from the newest whole checkpoint under --load: parameters, optimizer, schedule, position, generators.

    --finetune loads the parameters only, --no-load-optim and --no-load-rng leave their part out. At another layout
    everything but the generators is restored.

    Returns the checkpoint, or None if there was none.
    Raises ConfigurationError, on every rank and before anything has changed, if the checkpoint has another method,
    rank, base model, ..., or no checkpoint is whole (`find_whole_checkpoint`).
    """
    settings = state.config.checkpoint
    if settings.load is None:
        return None
    folder = Path(settings.load)
    from_first_rank(lambda: require_something_to_load(settings))
    checkpoint = find_whole_checkpoint(folder)
    if checkpoint is None:
        _warn("--load %s holds no checkpoint: starting from the beginning", folder)
        return None
    record = from_first_rank(lambda: run_record.read_record(checkpoint))
    base, schedule = base_fingerprint(state.config.model.pretrained_checkpoint), schedule_state(state.schedule)
    layers, digests = tensors.adapted_layers(state.model_chunks), (state.data_digest, state.tokenizer_digest)
    current = CurrentRun(state.config, state.shape, layers, base, schedule, *digests)
    resumes_optimizer = _resumes_optimizer(settings)
    # All of the record is compared before the first tensor is read, so that a refused checkpoint changes nothing.
    checked_together(lambda: _refuse(record, current, resumes_optimizer))
    if not settings.finetune and (warning := run_record.changes(record, current)):
        _warn("%s", warning)
    entries = state.entries
    index = tensors.load_parameters(entries, checkpoint)
    stored = tensors.stored_shapes(index)
    state.optimizer.reload_model_params()  # copies them into the float32 masters
    if resumes_optimizer:
        assert record.optimizer_steps is not None and record.schedule is not None
        tensors.read_tensors(optimizer_targets(state.optimizer, entries, stored), checkpoint, index)
        set_steps(state.optimizer, entries, record.optimizer_steps)
        _load_schedule(state, record.schedule)
    if not settings.finetune:
        for name, value in record.position.items():
            setattr(state.position, name, value)
        state.best = record.best
    if not (settings.finetune or settings.no_load_rng):
        targets = random_targets(stored)
        tensors.read_tensors(targets, checkpoint, index)  # a collective: without targets too
        if not (targets and restore_random(targets)):
            _warn("%s holds no random generators for this layout and device: they start from --seed", checkpoint)
    return checkpoint


def load_trained_parameters(model_chunks: Sequence[nn.Module], folder: str | Path) -> RunRecord:
    """Load the parameters of the newest checkpoint in a --save folder, or of a checkpoint; returns the run's record.

    model_chunks: this rank's, bare, with the base loaded and adapters attached as in `read_run_record(folder)`.
    Raises ConfigurationError, on every rank: there is no checkpoint, it is damaged, or it has other parameters.
    """
    checkpoint = from_first_rank(lambda: run_record.find_checkpoint(folder))
    require_whole(checkpoint)
    record = from_first_rank(lambda: run_record.read_record(checkpoint))
    entries = tensors.sharded_parameters(model_chunks, only_adapters=record.config.peft.trains_adapters)
    tensors.load_parameters(entries, checkpoint)
    return record


def _refuse(record: RunRecord, current: CurrentRun, resumes_optimizer: bool) -> None:
    if dist.get_rank() == 0:  # only it has read the base model's files
        problems = run_record.contradictions(record, current)
        if resumes_optimizer and not problems:
            problems = run_record.optimizer_contradictions(record, current)
        if problems:
            raise ConfigurationError(*problems)


def _load_schedule(state: TrainingState, stored: Mapping[str, Any]) -> None:
    schedule = state.schedule
    max_lr, min_lr = schedule.max_lr, schedule.min_lr
    own = schedule_state(schedule)
    schedule.num_steps = 0  # megatron-core adds the stored steps
    if state.config.optimizer.use_checkpoint_opt_param_scheduler:
        vars(schedule).update({name: stored[name] for name in NOT_IN_STATE})
        schedule.load_state_dict({**stored})
    else:
        schedule.load_state_dict({**stored, **{name: own[name] for name in run_record.unused_schedule_values(own)}})
    if (schedule.max_lr, schedule.min_lr) != (max_lr, min_lr):
        peft, decoupled = state.config.peft, state.config.optimizer.decoupled_lr
        own = {kind.attribute: kind.learning_rate for kind in peft.spec.param_groups if kind.is_labelled}
        for group in state.optimizer.param_groups:  # the schedule reads their rates
            if group["max_lr"] == decoupled != max_lr:
                continue
            rate = next((own[name] for name in own if group.get(name)), None)
            scaled = group["max_lr"] / max_lr * schedule.max_lr  # as LoRA+'s
            group["max_lr"] = rate(peft, schedule.max_lr) if rate else scaled
            group["min_lr"] = group["max_lr"] / schedule.max_lr * schedule.min_lr
    schedule.step(0)


def _warn(message: str, *values: Any) -> None:
    if dist.get_rank() == 0:
        logger.warning(message, *values)
