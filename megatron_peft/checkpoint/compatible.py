"""Whether a checkpoint can be loaded into a run: everything that contradicts, each with both values and the way out."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from megatron_peft.checkpoint.record import RunRecord
from megatron_peft.config import PeftConfig, RunConfig, flag
from megatron_peft.models.shape import ModelShape

# Numbers of a method that may change between a run and its continuation. Target modules are compared layer by layer.
FREE_TO_CHANGE = {"method", "target_modules", "lora_dropout", "lora_plus_ratio", "lora_max_norm_ratio"}
# Section -> fields that decide which samples come next, or what a step does with them.
FREE_BUT_TOLD = {
    "data": ("train_data_path", "data_path", "split", "seq_length", "overlong", "pack_sequences", "seed"),
    "training": ("global_batch_size", "seed"),
    "optimizer": ("adam_beta1", "adam_beta2", "adam_eps", "sgd_momentum", "clip_grad"),
}
SCHEDULE_FLAGS = {
    "max_lr": "--lr",
    "min_lr": "--min-lr",
    "lr_warmup_steps": "--lr-warmup-iters (or -samples, -fraction) in samples",
    "lr_decay_steps": "--lr-decay-iters (or -samples; default: the length of the run) in samples",
    "lr_decay_style": "--lr-decay-style",
    "start_wd": "--start-weight-decay",
    "end_wd": "--end-weight-decay",
    "wd_incr_steps": "the length of the run, over which weight decay grows, in samples",
    "wd_incr_style": "--weight-decay-incr-style",
}


@dataclasses.dataclass(frozen=True)
class Here:
    """The run that wants to load."""

    config: RunConfig
    shape: ModelShape
    adapted_layers: tuple[str, ...]
    base_fingerprint: Mapping[str, str] | None
    schedule: Mapping[str, Any]


def contradictions(record: RunRecord, here: Here) -> list[str]:
    """Why the checkpoint's parameters do not belong into this run."""
    there = record.config.peft.method
    if there != here.config.peft.method:
        return [
            f"{_load(here)} was trained with --peft-method {there}, but this run has --peft-method "
            f"{here.config.peft.method}: give --peft-method {there}, or another --load."
        ]
    return [*_other_base(record, here), *_other_numbers(record, here), *_other_layers(record, here)]


def changes(record: RunRecord, here: Here) -> str:
    """What a resumed run does otherwise than before, though it may: a sentence for the user, or nothing."""
    changed = [
        f"{flag(name)} {_shown(getattr(now, name))} (before: {_shown(getattr(before, name))})"
        for section, names in FREE_BUT_TOLD.items()
        for before, now in [(getattr(record.config, section), getattr(here.config, section))]
        for name in names
        if getattr(before, name) != getattr(now, name)
    ]
    told = ", ".join(dict.fromkeys(changed))  # --seed is in two sections
    return f"{_load(here)}: the run goes on with {told}, at the old position." if changed else ""


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def optimizer_contradictions(record: RunRecord, here: Here) -> list[str]:
    """Why the checkpoint's optimizer and schedule cannot go on in this run."""
    there, now = record.config.optimizer.optimizer, here.config.optimizer.optimizer
    if record.optimizer_steps is None or record.schedule is None:
        return [f"{_load(here)} was written with --no-save-optim: give --no-load-optim, or --finetune."]
    if there != now:
        return [
            f"{_load(here)} was trained with --optimizer {there}, but this run has --optimizer {now}: give "
            f"--optimizer {there}, or start the optimizer afresh with --no-load-optim."
        ]
    settings = here.config.optimizer
    if settings.use_checkpoint_opt_param_scheduler:
        return _steps_without_a_rate(record.schedule, here)
    if settings.override_opt_param_scheduler:
        return []
    changed = [
        f"{SCHEDULE_FLAGS[name]}: {record.schedule[name]} there, {here.schedule[name]} here"
        for name in SCHEDULE_FLAGS
        if record.schedule[name] != here.schedule[name] and name not in unused_schedule_values(here.schedule)
    ]
    return [
        f"{_load(here)} was trained with another schedule ({'; '.join(changed)}): give its values, or choose with "
        f"--override-opt-param-scheduler (this run's) or --use-checkpoint-opt-param-scheduler (the checkpoint's)."
    ] * bool(changed)


def _steps_without_a_rate(schedule: Mapping[str, Any], here: Here) -> list[str]:
    """The checkpoint's schedule may have come to its end, at a rate of 0, before this run does."""
    batch, end = here.config.global_batch_size, schedule["lr_decay_steps"]
    length = here.schedule["wd_incr_steps"]  # the run's, in samples
    if schedule["lr_decay_style"] == "constant" or schedule["min_lr"] > 0 or length <= end:
        return []
    return [
        f"{_load(here)}: its schedule, which --use-checkpoint-opt-param-scheduler takes, comes to a learning rate of 0 "
        f"after {end // batch} iterations, but this run has {length // batch}: the steps after that would train "
        f"nothing. Give --override-opt-param-scheduler (this run's schedule), or at most {end // batch} iterations."
    ]


def unused_schedule_values(schedule: Mapping[str, Any]) -> set[str]:
    """Values that a constant rate, or a constant weight decay, never looks at."""
    unused = set()
    if schedule["lr_decay_style"] == "constant":
        unused |= {"min_lr", "lr_decay_steps"}
    if schedule["wd_incr_style"] == "constant":
        unused |= {"wd_incr_steps"}
    return unused


def _other_base(record: RunRecord, here: Here) -> Iterator[str]:
    there, now = record.config.model.pretrained_checkpoint, here.config.model.pretrained_checkpoint
    differing = differing_base(record, here.shape, here.base_fingerprint)
    if differing:
        yield (
            f"{_load(here)} was trained on the base model {there}, but --pretrained-checkpoint {now} is another one "
            f"({', '.join(differing)}): give the base that it was trained on."
        )


def differing_base(record: RunRecord, shape: ModelShape, fingerprint: Mapping[str, str] | None) -> list[str]:
    """What tells a base model from the one that a run was trained on: sizes, or else files. Empty if it is the same."""
    shapes = dataclasses.asdict(record.shape), dataclasses.asdict(shape)
    differing = [
        f"{name} {shapes[0][name]} there, {shapes[1][name]} here"
        for name in shapes[0]
        if shapes[0][name] != shapes[1][name]
    ]
    if not differing and record.base_fingerprint and fingerprint:
        names = sorted(record.base_fingerprint.keys() | fingerprint.keys())
        differing = [name for name in names if record.base_fingerprint.get(name) != fingerprint.get(name)]
    return differing


def _other_numbers(record: RunRecord, here: Here) -> Iterator[str]:
    if not here.config.peft.trains_adapters:
        return
    for name in (field.name for field in dataclasses.fields(PeftConfig) if field.name not in FREE_TO_CHANGE):
        there, now = getattr(record.config.peft, name), getattr(here.config.peft, name)
        if there != now:
            yield (
                f"{_load(here)} was trained with {flag(name)} {there}, but this run has {flag(name)} {now}: "
                f"give {flag(name)} {there}, or another --load."
            )


def _other_layers(record: RunRecord, here: Here) -> Iterator[str]:
    there, now = set(record.adapted_layers), set(here.adapted_layers)
    if there != now:
        patterns = " ".join(record.config.peft.target_modules)
        yield (
            f"{_load(here)} was trained with --peft-target-modules {patterns} ({len(there)} layers), but this run has "
            f"--peft-target-modules {' '.join(here.config.peft.target_modules)} ({len(now)} layers; the first that "
            f"differs is {min(there ^ now)}): give --peft-target-modules {patterns}."
        )


def _load(here: Here) -> str:
    return f"--load {here.config.checkpoint.load}"
