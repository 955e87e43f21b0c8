"""`RunConfig`: everything a run needs, in frozen dataclasses that validate themselves.

Field names are Megatron's argument names (underscores for dashes), so an error can always name the flag. Every
section raises one `ConfigurationError` with all of its problems as it is made. Nothing in this room imports torch.
"""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, fields
from typing import Any, get_type_hints

from megatron_peft.config.errors import Checked, ConfigurationError, Requirements, flag, require, spelled
from megatron_peft.config.methods import METHODS, PeftConfig
from megatron_peft.config.model import DataConfig, ModelConfig
from megatron_peft.config.training import (
    CheckpointConfig,
    LoggingConfig,
    OptimizerSettings,
    ParallelConfig,
    TrainingConfig,
)


@dataclass(frozen=True)
class RunConfig(Checked):
    """Everything a run needs. Checks here are those that span two groups."""

    parallel: ParallelConfig
    model: ModelConfig
    peft: PeftConfig
    data: DataConfig
    training: TrainingConfig
    optimizer: OptimizerSettings = OptimizerSettings()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()

    def check(self, require: Requirements) -> None:
        for check in _CHECKS:
            check(self, require)

    def _check_batches(self, require: Requirements) -> None:
        parallel, training, pp = self.parallel, self.training, self.parallel.pipeline_model_parallel_size
        step = training.micro_batch_size * parallel.data_parallel_size
        below = self.global_batch_size // step * step
        require(
            self.global_batch_size % step == 0,
            f"--global-batch-size {self.global_batch_size} is not a multiple of --micro-batch-size "
            f"{training.micro_batch_size} x {parallel.data_parallel_size} data-parallel ranks = {step}: "
            f"use {' or '.join(str(batch) for batch in (below, below + step) if batch)}.",
        )
        if parallel.is_interleaved:
            require(
                pp != 2 or self.model.transformer.get("overlap_p2p_comm", True),
                "--no-overlap-p2p-communication confuses messages of the interleaved schedule between "
                "--pipeline-model-parallel-size 2 stages: leave it out, or use 3 stages or more.",
            )
            require(
                self.num_microbatches % pp == 0,
                f"the interleaved schedule needs a multiple of --pipeline-model-parallel-size {pp} microbatches a "
                f"step, but --global-batch-size {self.global_batch_size} gives {self.num_microbatches}.",
            )

    def _check_layout(self, require: Requirements) -> None:
        parallel, transformer, tp = self.parallel, self.model.transformer, self.parallel.tensor_model_parallel_size
        require(
            not parallel.sequence_parallel or self.data.seq_length % tp == 0,
            f"--seq-length {self.data.seq_length} is not a multiple of --tensor-model-parallel-size {tp}, which "
            f"--sequence-parallel needs: use {self.data.seq_length // tp * tp or tp}.",
        )
        require(
            not transformer.get("distribute_saved_activations") or (tp > 1 and not parallel.sequence_parallel),
            "--distribute-saved-activations: only with --tensor-model-parallel-size > 1, and no --sequence-parallel.",
        )
        require(
            not self.optimizer.overlap_param_gather or self.training.overlap_grad_reduce,
            "--overlap-param-gather needs --overlap-grad-reduce.",
        )

    def _check_validation(self, require: Requirements) -> None:
        training = self.training
        has_data = bool(self.data.valid_data_path or self.data.data_path)
        validates = has_data and training.eval_interval is not None and training.eval_iters != 0
        by_item = (self.logging, "log_validation_items")
        for section, name in ((training, "early_stopping_patience"), (self.checkpoint, "keep_best"), by_item):
            require(
                validates or not getattr(section, name),
                f"{spelled(flag(name), getattr(section, name))} needs a validation loss: give --valid-data-path (or "
                f"--data-path with a --split), and no --eval-iters 0.",
            )
        require(
            self.checkpoint.save is not None or not self.logging.log_validation_items,
            "--log-validation-items writes to the folder of --save: give one.",
        )

    def _check_method(self, require: Requirements) -> None:
        self.peft.spec.check_run(self.peft, self, require)

    def _check_quantized_base(self, require: Requirements) -> None:
        """Nothing may change weights that exist in a few bits only."""
        peft, precision = self.peft, self.model.base_precision
        changing = {
            "--peft-method full trains": not peft.trains_adapters,
            "--urnn-mode replace replaces": peft.spec.replaces_base(peft),
            "--hybrid-merge-interval merges into": peft.spec.merge_interval(peft) is not None,
        }
        for what, is_so in changing.items():
            require(
                precision == "run" or not is_so,
                f"--base-precision {precision} keeps the base's weights as they are, but {what} them: leave out one.",
            )

    def _check_schedule(self, require: Requirements) -> None:
        """Lengths of the schedule count what the length of the run counts, and the warmup ends before the decay."""
        by_samples = self.training.train_samples is not None
        unit, other = ("samples", "iters") if by_samples else ("iters", "samples")
        for stem in ("lr_decay_", "lr_warmup_", "lr_wsd_decay_"):
            require(
                not getattr(self.optimizer, stem + other),
                f"{flag(stem + other)} does not fit --train-{unit}: use {flag(stem + unit)}.",
            )
        warmup = getattr(self.optimizer, "lr_warmup_" + unit)
        decay = getattr(self.optimizer, "lr_decay_" + unit) or getattr(self.training, "train_" + unit)
        require(
            decay is None or warmup < decay,
            f"{flag('lr_warmup_' + unit)} {warmup} must be below the {decay} {unit} of the decay.",
        )
        lr, start = self.optimizer.lr, self.optimizer.lr_warmup_init
        for group in self.peft.spec.param_groups:
            rate = group.learning_rate(self.peft, lr) if group.learning_rate else lr
            require(
                rate == lr or start <= rate,
                f"--lr-warmup-init {start} is above {rate:g}, the peak rate of the parameters with {group.attribute}: "
                "lower it, or they begin above their peak.",
            )

    @property
    def global_batch_size(self) -> int:
        """Samples a step over all ranks."""
        return self.training.global_batch_size or self.training.micro_batch_size * self.parallel.data_parallel_size

    @property
    def wsd_decay_samples(self) -> int:
        """Samples of the last phase of WSD; 0 without."""
        settings = self.optimizer
        return settings.lr_wsd_decay_samples or (settings.lr_wsd_decay_iters or 0) * self.global_batch_size

    @property
    def num_microbatches(self) -> int:
        """Microbatches a step on each rank."""
        return self.global_batch_size // (self.training.micro_batch_size * self.parallel.data_parallel_size)

    @property
    def num_iters(self) -> int | None:
        """Length of the run; None without one, and with --train-epochs, whose samples only the data know."""
        samples = self.training.train_samples
        return self.training.train_iters if samples is None else samples // self.global_batch_size

    @property
    def num_tokens(self) -> int | None:
        """Tokens of the whole run, if every sequence is full."""
        length = self.num_iters
        return None if length is None else length * self.global_batch_size * self.data.seq_length


_CHECKS = (
    RunConfig._check_batches,
    RunConfig._check_layout,
    RunConfig._check_schedule,
    RunConfig._check_validation,
    RunConfig._check_method,
    RunConfig._check_quantized_base,
)


class _InvalidSectionError(Exception):
    """A check has read a section that could not be made."""


class _InvalidSection:
    def __getattr__(self, name: str) -> Any:
        raise _InvalidSectionError


def _problems_of_valid(sections: Mapping[str, Any]) -> tuple[str, ...]:
    """Run the cross-section checks whose sections are all valid (None: an invalid one); return their problems."""
    run = object.__new__(RunConfig)
    vars(run).update({name: _InvalidSection() if each is None else each for name, each in sections.items()})
    try:
        with Requirements(run) as require:
            for check in _CHECKS:
                with suppress(_InvalidSectionError):
                    check(run, require)
    except ConfigurationError as error:
        return error.problems
    return ()


def missing_to_profile(config: RunConfig) -> list[str]:
    """Messages for what is to be profiled and is no part of the run: ranks, and the first of the steps.

    Not a check of `RunConfig`: a run may be planned or certified with fewer ranks and steps than it trains with.
    """
    logging, world_size = config.logging, config.parallel.world_size
    outside = [rank for rank in logging.profile_ranks if not 0 <= rank < world_size]
    problems, length = [], config.num_iters
    last = logging.profile_step_end if length is None else min(length, logging.profile_step_end)
    if (logging.profile or logging.record_memory_history) and outside:
        problems.append(f"--profile-ranks: leave out {outside}, as the ranks of this run are 0 to {world_size - 1}.")
    if logging.profile and logging.profile_step_start >= last:
        problems.append(
            f"--profile needs --profile-step-start below {last}, the last step of the run or of --profile-step-end, "
            f"but it is {logging.profile_step_start}: no step would be profiled."
        )
    return problems


def field_names(config_class: type) -> tuple[str, ...]:
    """The field names of a dataclass, in order."""
    return tuple(f.name for f in fields(config_class))


def config_to_dict(config: RunConfig) -> dict[str, dict[str, Any]]:
    """{section: {field: value}} with lists for tuples; what `config_from_dict` reads back to an equal RunConfig."""
    record: dict[str, dict[str, Any]] = {}
    for section, part in vars(config).items():
        values = {name: getattr(part, name) for name in getattr(part, "recorded_fields", field_names(type(part)))}
        record[section] = {name: [*value] if isinstance(value, tuple) else value for name, value in values.items()}
    return record


SECTIONS: Mapping[str, type] = get_type_hints(RunConfig)


def sections_of(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The sections of a run by name, made of those `values` that are their fields, and everything that is wrong.

    A section that cannot be made is None. A field that two sections have (seed) is that of both.
    """
    sections: dict[str, Any] = {}
    problems: list[str] = []
    for section, config_class in SECTIONS.items():
        given = {name: values[name] for name in field_names(config_class) if name in values}
        try:
            sections[section] = config_class(**given)
        except ConfigurationError as error:
            sections[section] = None
            problems += error.problems
    if None in sections.values():  # RunConfig itself cannot be made
        problems += _problems_of_valid(sections)
    return sections, problems


def make_run(**values: Any) -> RunConfig:
    """A run of these fields, whatever sections they belong to: `make_run(pretrained_checkpoint="m", lora_rank=4)`.

    Raises TypeError if no section has a field of this name, and ConfigurationError.
    """
    unknown = values.keys() - {name for config_class in SECTIONS.values() for name in field_names(config_class)}
    if unknown:
        raise TypeError(f"no section of a run has {', '.join(sorted(unknown))}")
    sections, problems = sections_of(values)
    if problems:
        raise ConfigurationError(*problems)
    return RunConfig(**sections)


def config_from_dict(record: Mapping[str, Mapping[str, Any]]) -> RunConfig:
    """The RunConfig of a record. Fields that an older record lacks take their defaults.

    Raises ConfigurationError for fields that this version does not know, and for values that contradict one another.
    """
    method = record.get("peft", {}).get("method", PeftConfig.method)
    if isinstance(method, str) and method not in METHODS:
        PeftConfig(method)  # the error says why the method is not here
    known = {section: field_names(config_class) for section, config_class in SECTIONS.items()}
    named = [(section, name) for section, values in record.items() for name in values]
    unknown = [f"{section}.{name}" for section, name in named if name not in known.get(section, ())]
    require(
        not unknown,
        f"the run's record holds {', '.join(unknown)}, which this installation does not know: it was written by a "
        f"newer version of megatron_peft, or with another package of methods.",
    )
    sections = {}
    for section, config_class in SECTIONS.items():
        values = record.get(section, {}).items()
        sections[section] = config_class(**{name: tuple(it) if isinstance(it, list) else it for name, it in values})
    return RunConfig(**sections)
