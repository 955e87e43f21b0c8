"""The record of the run that wrote a checkpoint, whether another run may load it, and the base model's fingerprint."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from functools import lru_cache
from math import ceil, isfinite
from pathlib import Path
from typing import Any

from megatron_peft.checkpoint import folders
from megatron_peft.checkpoint.folders import MANIFEST, RECORD
from megatron_peft.config import ConfigurationError, PeftConfig, RunConfig, config_from_dict, config_to_dict, require
from megatron_peft.config.errors import flag, mistyped, spelled
from megatron_peft.config.training import LENGTHS
from megatron_peft.config.untrusted import parse_json, read_text
from megatron_peft.models.shape import ModelShape, RopeScaling

FORMAT_VERSION = 1
COUNTERS = ("iteration", "consumed_samples", "consumed_tokens")  # of a position
ADAPTER_CONFIG = "adapter_config.json"  # in a checkpoint with adapters, and beside the tracker


@dataclasses.dataclass(frozen=True)
class BestValidation:
    """The lowest validation loss of a run so far, and how many validations there were since."""

    loss: float | None = None  # as long as no validation gave a number
    iteration: int = 0
    num_since: int = 0
    was_interrupted: bool = False  # the run was asked to stop in a validation, with which the one that resumes begins

    def after(self, loss: float, iteration: int) -> "BestValidation":
        """This, after another validation. A loss that is not a finite number is never the lowest."""
        if isfinite(loss) and (self.loss is None or loss < self.loss):
            return BestValidation(loss, iteration)
        return BestValidation(self.loss, self.iteration, self.num_since + 1)


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """Everything in a checkpoint except its tensors."""

    config: RunConfig
    shape: ModelShape  # of the base model
    position: Mapping[str, int]  # counters by name (`iteration`, `consumed_samples`, ...)
    adapted_layers: tuple[str, ...]  # global names, over all ranks; empty for full fine-tuning
    base_fingerprint: Mapping[str, str] | None  # {file name: digest} of the base's folder; None: it could not be read
    schedule: Mapping[str, Any] | None  # `checkpoint.state.schedule_state`; None without optimizer state
    optimizer_steps: Mapping[str, int] | None  # updates of each parameter, by key; None without optimizer state
    data_digest: str | None = None  # of the training data's files; older records have none
    tokenizer_digest: str | None = None  # with its chat template; older records have none
    best: BestValidation = BestValidation()  # older records have none
    longest_sample: int | None = None  # of the training data, in input positions; older records have none

    def to_json(self) -> str:
        """The text of the record's file, with its format's version."""
        plain = {
            "config": config_to_dict(self.config),
            "shape": {**dataclasses.asdict(self.shape), "linear_biases": sorted(self.shape.linear_biases)},
            "best": dataclasses.asdict(self.best),
        }
        return json.dumps({"format_version": FORMAT_VERSION, **vars(self), **plain}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "RunRecord":
        """Raises ConfigurationError (newer format or fields), ValueError, KeyError or TypeError (not a record)."""
        fields = parse_json(text, RECORD)
        if not isinstance(fields, dict) or not isinstance(fields.get("config"), dict):
            raise ValueError("not the record of a run")
        version = fields.pop("format_version")
        require(
            version <= FORMAT_VERSION,
            f"it has format {version} and this version of megatron_peft reads up to {FORMAT_VERSION}: update it.",
        )
        data, shape = fields["config"].get("data", {}), fields["shape"]
        if isinstance(data, dict) and data.get("pack_sequences"):
            data.setdefault("packing", "next-fit")  # there was no other before there was a flag for it
        biases, scaling = shape["linear_biases"], shape["rope_scaling"]
        rope_scaling = None if scaling is None else RopeScaling(**scaling)
        config = config_from_dict(fields["config"])
        if isinstance(fields["schedule"], dict):  # older records have megatron-core's state alone
            settings = config.optimizer
            wsd = {"wsd_decay_steps": config.wsd_decay_samples, "lr_wsd_decay_style": settings.lr_wsd_decay_style}
            fields["schedule"] = {"init_lr": settings.lr_warmup_init, **wsd, **fields["schedule"]}
        read = {
            "config": config,
            "shape": ModelShape(**{**shape, "linear_biases": frozenset(biases), "rope_scaling": rope_scaling}),
            "adapted_layers": tuple(fields["adapted_layers"]),
            "best": BestValidation(**(fields.get("best") or {})),
        }
        record = cls(**{**fields, **read})
        counters, steps = record.position, record.optimizer_steps
        are_right = {
            "position": {"iteration"} <= counters.keys() <= set(COUNTERS) and _are_counts(counters),
            "optimizer_steps": steps is None or _are_counts(steps),
            "adapted_layers": isinstance(fields["adapted_layers"], list),
            "best": _are_counts({"iteration": record.best.iteration, "num_since": record.best.num_since}),
            "schedule": record.schedule is None or _is_schedule(record.schedule),
            "base_fingerprint": all(isinstance(digest, str) for digest in (record.base_fingerprint or {}).values()),
            "linear_biases": isinstance(biases, list) and all(isinstance(name, str) for name in biases),
        }
        wrong = [name for name, is_right in are_right.items() if not is_right]
        wrong += {**mistyped(record), **mistyped(record.best)}
        if wrong:
            raise ValueError(f"its {', '.join(wrong)} cannot be that of a run")
        return record

    def adapter_config(self) -> str:
        """JSON with the method's settings and the base model, for people and for tools that look for adapters."""
        fields = {
            "base_model_name_or_path": self.config.model.pretrained_checkpoint,
            "base_model_fingerprint": self.base_fingerprint,
            **config_to_dict(self.config)["peft"],
            "adapted_layers": self.adapted_layers,
        }
        return json.dumps(fields, indent=2) + "\n"


def read_run_record(folder: str | Path) -> RunRecord:
    """The record of the newest checkpoint in a --save folder, or of a checkpoint. Raises ConfigurationError."""
    return read_record(find_checkpoint(folder))


def find_checkpoint(folder: str | Path) -> Path:
    """The newest checkpoint in a --save folder. Raises ConfigurationError if there is none."""
    checkpoint = folders.newest_checkpoint(Path(folder))
    if checkpoint is None:
        raise ConfigurationError(f"{folder} holds no checkpoint: give the --save folder of a run.")
    return checkpoint


def read_record(checkpoint: Path) -> RunRecord:
    """The record inside a checkpoint. Raises ConfigurationError naming the file if it cannot be read."""
    path = checkpoint / RECORD
    text = read_text(path)
    try:
        return RunRecord.from_json(text)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigurationError(f"{path} cannot be read: {error}") from error


def _are_counts(numbers: Mapping[str, Any]) -> bool:
    return all(type(number) is int and number >= 0 for number in numbers.values())


def _is_schedule(schedule: Mapping[str, Any]) -> bool:
    kinds: dict[str, tuple[type, ...]] = {"style": (str,), "steps": (int,)}  # others are rates
    return all(
        type(value := schedule[name]) in kinds.get(name.rpartition("_")[2], (int, float))
        and (isinstance(value, str) or value >= 0)
        for name in (*SCHEDULE_FLAGS, "num_steps")
    )


# Whether a run may load a checkpoint. Every contradiction is an error with both values and the way out.

# Section -> fields that a resumed run may change with a warning: other samples, or other updates. So may it those of
# its method that are declared with `may_change`; other layers are an error.
CHANGED_WITH_WARNING = {
    "data": (
        *("train_data_path", "data_path", "split", "seq_length", "overlong", "pack_sequences", "packing", "seed"),
        *("prompt_column", "response_column", "messages_column", "text_column", "chat_template"),
    ),
    "training": ("seed",),
    "model": ("bf16",),
    "optimizer": ("adam_beta1", "adam_beta2", "adam_eps", "sgd_momentum", "clip_grad"),
}
SCHEDULE_FLAGS = {
    "max_lr": "--lr",
    "min_lr": "--min-lr",
    "lr_warmup_steps": "--lr-warmup-iters (or -samples, -fraction) in samples",
    "lr_decay_steps": "--lr-decay-iters (or -samples; default: the length of the run) in samples",
    "lr_decay_style": "--lr-decay-style",
    "init_lr": "--lr-warmup-init",
    "wsd_decay_steps": "--lr-wsd-decay-iters (or -samples) in samples",
    "lr_wsd_decay_style": "--lr-wsd-decay-style",
    "start_wd": "--start-weight-decay",
    "end_wd": "--end-weight-decay",
    "wd_incr_steps": "the length of the run (over which weight decay increases) in samples",
    "wd_incr_style": "--weight-decay-incr-style",
}


@dataclasses.dataclass(frozen=True)
class CurrentRun:
    """The run that loads a checkpoint. Fields are those of `RunRecord`; `adapted_layers` may be unknown yet (None)."""

    config: RunConfig
    shape: ModelShape
    adapted_layers: tuple[str, ...] | None
    base_fingerprint: Mapping[str, str] | None
    schedule: Mapping[str, Any]
    data_digest: str | None = None
    tokenizer_digest: str | None = None


def contradictions(record: RunRecord, current: CurrentRun) -> list[str]:
    """Why this run cannot take the checkpoint's parameters."""
    there, peft, load = record.config.peft, current.config.peft, _load(current)
    another = "another --save" if load.startswith("--save") else "another --load"
    if there.method != peft.method:
        return [
            f"{load} was trained with --peft-method {there.method}, but this run has --peft-method {peft.method}: give "
            f"--peft-method {there.method}, or {another}."
        ]
    problems = []
    if differing := differing_base(record, current.shape, current.base_fingerprint):
        problems.append(
            f"{load} was trained on the base model {record.config.model.pretrained_checkpoint}, but "
            f"--pretrained-checkpoint {current.config.model.pretrained_checkpoint} is another one "
            f"({', '.join(differing)}): give the base that it was trained on."
        )
    precisions = [run.config.model.quantization for run in (record, current)]
    if precisions[0] != precisions[1] and not current.config.checkpoint.allow_other_base_precision:
        typed = [" ".join(spelled(flag(name), value) for name, value in flags.items() if value) for flags in precisions]
        problems.append(
            f"{load} was trained with {typed[0]}, but this run has {typed[1]}, another base for its adapters: give the "
            f"same, or --allow-other-base-precision."
        )
    for name in sorted(peft.spec.fields(peft) - _may_change()) if peft.trains_adapters else ():
        before, now = getattr(there, name), getattr(peft, name)
        if before != now:
            problems.append(
                f"{load} was trained with {flag(name)} {before}, but this run has {flag(name)} {now}: give "
                f"{flag(name)} {before}, or {another}."
            )
    layers_there, layers = set(record.adapted_layers), set(current.adapted_layers or ())
    if current.adapted_layers is not None and layers_there != layers:
        patterns = " ".join(there.target_modules)
        problems.append(
            f"{load} was trained with --peft-target-modules {patterns} ({len(layers_there)} layers), but this run has "
            f"--peft-target-modules {' '.join(peft.target_modules)} ({len(layers)} layers; the first that differs is "
            f"{min(layers_there ^ layers)}): give --peft-target-modules {patterns}."
        )
    return problems


def changes(record: RunRecord, current: CurrentRun) -> str:
    """A warning about permitted changes in a resumed run, or an empty string."""
    without_effect = {"method", "target_modules", "lora_ga_batches"}  # nothing is initialized again
    of_method = current.config.peft.spec.fields(current.config.peft) & _may_change() - without_effect
    values = [
        (name, getattr(getattr(record.config, section), name), getattr(getattr(current.config, section), name))
        for section, names in {**CHANGED_WITH_WARNING, "peft": sorted(of_method)}.items()
        for name in names
    ]
    before, now = record.config.model.transformer, current.config.model.transformer
    values += [(name, before.get(name, 0.0), now.get(name, 0.0)) for name in ("hidden_dropout", "attention_dropout")]
    values.append(("global_batch_size", record.config.global_batch_size, current.config.global_batch_size))
    tokenizers = {record.tokenizer_digest, current.tokenizer_digest}
    if len(tokenizers) == 1 and None not in tokenizers:  # the path of a template may be another
        values = [value for value in values if value[0] != "chat_template"]
    changed = [f"{flag(name)} {_shown(new)} (before: {_shown(old)})" for name, old, new in values if old != new]
    # training data whose path is the same
    paths = {(config.data.train_data_path, config.data.data_path) for config in (record.config, current.config)}
    digests = record.data_digest, current.data_digest
    if len(paths) == 1 and all(digests) and digests[0] != digests[1]:
        name = "data_path" if current.config.data.data_path else "train_data_path"
        changed.append(f"other contents of {flag(name)} {_shown(getattr(current.config.data, name))} than before")
    if len(tokenizers) == 2 and None not in tokenizers:
        changed.append("another tokenizer or chat template than before")
    listed = ", ".join(dict.fromkeys(changed))  # --seed is in two sections
    return f"{_load(current)}: the run continues with {listed}, at the old position." if changed else ""


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) or "none" if isinstance(value, tuple) else str(value)


def optimizer_contradictions(record: RunRecord, current: CurrentRun) -> list[str]:
    """Why this run cannot take the checkpoint's optimizer and schedule."""
    there, now = record.config.optimizer.optimizer, current.config.optimizer.optimizer
    if record.optimizer_steps is None or record.schedule is None:
        return [f"{_load(current)} was written with --no-save-optim: give --no-load-optim, or --finetune."]
    if there != now:
        return [
            f"{_load(current)} was trained with --optimizer {there}, but this run has --optimizer {now}: give "
            f"--optimizer {there}, or start the optimizer afresh with --no-load-optim."
        ]
    settings = current.config.optimizer
    if settings.use_checkpoint_opt_param_scheduler:
        rates = [run.config.peft.peft_lr_rotation for run in (record, current)]
        if rates[0] != rates[1] and "peft_lr_rotation" in current.config.peft.spec.fields(current.config.peft):
            return [
                f"{_load(current)} was trained with --peft-lr-rotation {rates[0]}, which is kept with "
                f"--use-checkpoint-opt-param-scheduler, but this run has {rates[1]}: give that, or leave "
                f"--use-checkpoint-opt-param-scheduler out."
            ]
        return _steps_without_a_rate(record, record.schedule, current)
    if settings.override_opt_param_scheduler:
        return _another_end(record, current)
    unused = unused_schedule_values(current.schedule)
    names = [name for name in SCHEDULE_FLAGS if name not in unused and record.schedule[name] != current.schedule[name]]
    if not names:
        return _another_end(record, current)
    before, after = (_typed_length(run.config) for run in (record, current))
    if before != after and {*names} <= _values_of_the_length(current.config):
        return [
            f"{_load(current)} was trained with {before}, and its learning rate decays over that length, but this run "
            f"has {after}: to decay over the new length, add --override-opt-param-scheduler."
        ]
    changed = [
        f"{SCHEDULE_FLAGS[name]}: {record.schedule[name]} there, {current.schedule[name]} here" for name in names
    ]
    return [
        f"{_load(current)} was trained with another schedule ({'; '.join(changed)}): give its values, or choose with "
        f"--override-opt-param-scheduler (this run's) or --use-checkpoint-opt-param-scheduler (the checkpoint's)."
    ]


def _typed_length(config: RunConfig) -> str:
    """Return the flag that sets the length of a run, with its value."""
    lengths = {name: getattr(config.training, name) for name in LENGTHS}
    return next((spelled(flag(name), value) for name, value in lengths.items() if value is not None), "")


def _values_of_the_length(config: RunConfig) -> set[str]:
    """Return the values of the schedule that follow from the length of the run."""
    settings = config.optimizer
    if settings.lr_decay_iters or settings.lr_decay_samples:
        return {"wd_incr_steps"}
    by_fraction = {"lr_warmup_steps"} if settings.lr_warmup_fraction is not None else set()
    return {"lr_decay_steps", "wd_incr_steps"} | by_fraction


def _samples_at_the_end(record: RunRecord, current: CurrentRun) -> int:
    """Samples of the whole run; those before the checkpoint may have come in other batches."""
    train_iters, batch = current.config.training.train_iters, current.config.global_batch_size
    if train_iters is None:
        return current.schedule["wd_incr_steps"]
    iteration = record.position["iteration"]
    done = record.position.get("consumed_samples", iteration * record.config.global_batch_size)
    return done + max(train_iters - iteration, 0) * batch


def _steps_without_a_rate(record: RunRecord, schedule: Mapping[str, Any], current: CurrentRun) -> list[str]:
    """The checkpoint's schedule may reach a learning rate of 0 before this run ends."""
    batch, end = current.config.global_batch_size, _samples_at_the_end(record, current)
    num_lost = (end - schedule["lr_decay_steps"]) // batch
    if schedule["lr_decay_style"] == "constant" or schedule["min_lr"] > 0 or num_lost <= 0:
        return []
    num_steps = current.config.training.train_iters or end // batch
    most = num_steps - num_lost
    return [
        f"{_load(current)}: its schedule, which --use-checkpoint-opt-param-scheduler takes, reaches a learning rate "
        f"of 0 after {most} iterations, but this run has {num_steps}: the steps after that would train nothing. Give "
        f"--override-opt-param-scheduler (this run's schedule), or at most {most} iterations."
    ]


def _another_end(record: RunRecord, current: CurrentRun) -> list[str]:
    """What is wrong if the run ends before or after its decay, since its batch was another before the checkpoint."""
    batch, end = current.config.global_batch_size, _samples_at_the_end(record, current)
    decay, length = current.schedule["lr_decay_steps"], current.schedule["wd_incr_steps"]
    is_late = length <= decay <= end - batch and current.schedule["min_lr"] == 0  # its last steps would train nothing
    is_early = end + batch <= decay <= length
    if current.schedule["lr_decay_style"] == "constant" or not (is_late or is_early):
        return []
    return [
        f"{_load(current)} comes from another --global-batch-size: this run ends after {end} samples, but its learning "
        f"rate decays over {decay}. Give --override-opt-param-scheduler --lr-decay-iters {ceil(end / batch)}, with "
        f"which it decays to the run's end."
    ]


def unused_schedule_values(schedule: Mapping[str, Any]) -> set[str]:
    """Values that the style of the learning rate, or of weight decay, ignores."""
    unused = set()
    if schedule["lr_decay_style"] == "constant":
        unused |= {"min_lr", "lr_decay_steps"}
    if schedule["wd_incr_style"] == "constant":
        unused |= {"wd_incr_steps"}
    if schedule["lr_decay_style"] != "WSD":
        unused |= {"wsd_decay_steps", "lr_wsd_decay_style"}
    return unused


def differing_base(record: RunRecord, shape: ModelShape, fingerprint: Mapping[str, str] | None) -> list[str]:
    """How a base model differs from that of the record: in sizes, or else in files. Empty if it is the same."""
    there, here = dataclasses.asdict(record.shape), dataclasses.asdict(shape)
    differing = [f"{name} {there[name]} there, {here[name]} here" for name in there if there[name] != here[name]]
    if not differing and record.base_fingerprint and fingerprint:
        names = sorted(record.base_fingerprint.keys() | fingerprint.keys())
        differing = [name for name in names if record.base_fingerprint.get(name) != fingerprint.get(name)]
    return differing


def _may_change() -> set[str]:
    return {field.name for field in dataclasses.fields(PeftConfig) if field.metadata["may_change"]}


def _load(current: CurrentRun) -> str:
    settings = current.config.checkpoint
    is_automatic = settings.resume == "auto" and settings.load == settings.save
    return f"--save {settings.save} (--resume auto)" if is_automatic else f"--load {settings.load}"


# A cheap fingerprint of a base model's folder, so that adapters are never put on another base: config.json, and of each
# weight file its size, start (names, types, shapes and offsets in safetensors), end and some samples, which differ
# between two models of the same shape. If the base is a --save folder, the files are those of its newest checkpoint,
# with the manifest.

WEIGHT_PATTERNS = ("*.safetensors", "*.bin", "*.distcp")  # the first with a match is taken
_START_BYTES = 256 * 1024
_END_BYTES = 64 * 1024
_NUM_SAMPLES, _SAMPLE_BYTES = 16, 4096


def fingerprint(folder: str) -> dict[str, str]:
    """{path relative to the folder: digest} of config.json and the weight files. Cached, since every save needs it.

    Raises OSError if the folder or a file cannot be read.
    """
    return fingerprint_of(Path(folder).absolute())  # a relative path means another folder after os.chdir


@lru_cache
def fingerprint_of(root: Path) -> dict[str, str]:
    """`fingerprint` of an absolute path."""
    place = folders.megatron_files(root) or root
    described = [path for path in (root / "config.json", place / "config.json", place / MANIFEST) if path.is_file()]
    files = dict.fromkeys([*described, *weight_files(place)])
    if not files:
        raise FileNotFoundError(f"{root} holds neither config.json nor weights")
    return {str(path.relative_to(root)): sampled_digest(path) for path in files}


def weight_files(folder: Path) -> list[Path]:
    """The files with weights, sorted: those of one pattern, or of the folders of old Megatron ranks."""
    matches = (sorted(folder.glob(pattern)) for pattern in WEIGHT_PATTERNS)
    ranks = (path for path in sorted(folder.glob("mp_rank_*")) if folders.RANK_FOLDER.fullmatch(path.name))
    of_ranks = [path / name for path in ranks for name in folders.RANK_FILES if (path / name).is_file()]
    return next((files for files in matches if files), of_ranks)


def sampled_digest(path: Path) -> str:
    """SHA-256 of a file's size and of some of its bytes (all bytes of a small file)."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    ranges = [(0, size)]  # first byte, number of bytes
    if size > _START_BYTES + _END_BYTES:
        firsts = [size * sample // (_NUM_SAMPLES + 1) for sample in range(1, _NUM_SAMPLES + 1)]
        samples = [(first, _SAMPLE_BYTES) for first in firsts]
        ranges = [(0, _START_BYTES), *samples, (size - _END_BYTES, _END_BYTES)]
    with open(path, "rb") as file:
        for first, length in ranges:
            file.seek(first)
            digest.update(file.read(length))
    return digest.hexdigest()
