"""An experiment as its YAML file says it: models x tasks x methods, a grid for each method, seeds.

A flag is written without its dashes. `true` is a switch that is given, `false` and `null` leave a flag out, a list is
a flag with several values; anything else is the flag's value, as it stands.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_peft.config import ConfigurationError

FlagValues = Mapping[str, Any]

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")
RUNNERS_OWN = {  # flag -> what to write instead
    "seed": "list the seeds under seeds:",
    "save": "each cell has a folder of its own",
    "load": "a cell that was stopped goes on by itself",
}
BUDGET = (  # the same for all methods, or their results say nothing about the methods
    "train-iters train-samples train-epochs global-batch-size seq-length pack-sequences overlong "
    "train-data-path valid-data-path test-data-path data-path split optimizer bf16 clip-grad micro-batch-size "
    "lr-decay-style lr-decay-iters lr-decay-samples lr-warmup-iters lr-warmup-samples lr-warmup-fraction "
    "lr-warmup-init min-lr eval-iters eval-interval"
).split()


VALIDATED = ("valid-data-path", "data-path")  # either gives a validation loss


@dataclass(frozen=True)
class Metric:
    """A number of a score's JSON file: the mean of what is at `paths`, times `scale` (100 for %).

    A path is the keys to a number, joined by slashes.
    """

    paths: tuple[str, ...]
    higher_is_better: bool = True
    scale: float = 1.0


@dataclass(frozen=True)
class Score:
    """How a trained cell is scored. `command` may hold {output}, {checkpoints} and, as a word of its own, {flags}."""

    command: tuple[str, ...]
    metrics: Mapping[str, Metric]


@dataclass(frozen=True)
class Choice:
    """A model, a task or a method: its name, and the flags that it adds.

    Attributes:
        grid: flag -> its values, for methods.
        processes: of torchrun, for models; 1 starts plain python.
        score: for tasks; None leaves it at the validation loss.
        slurm: options of sbatch, for models.
        paper: what of the paper's Table I it is set beside in reports: a column, a benchmark or a method.
    """

    name: str
    flags: FlagValues
    grid: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    processes: int = 1
    score: Score | None = None
    slurm: FlagValues = field(default_factory=dict)
    paper: str | None = None


@dataclass(frozen=True)
class Experiment:
    """What an experiment's file says, checked as far as that goes without reading flags.

    Attributes:
        seeds: of the final runs; tuning_seed: of the runs that the settings are chosen by.
        prepare: commands that run before the first cell.
        text: of the file, which the runner leaves beside the cells.
    """

    name: str
    title: str
    flags: FlagValues
    models: tuple[Choice, ...]
    tasks: tuple[Choice, ...]
    methods: tuple[Choice, ...]
    seeds: tuple[int, ...]
    tuning_seed: int
    prepare: tuple[tuple[str, ...], ...] = ()
    text: str = ""

    def __post_init__(self) -> None:
        problems = [*self._unfit_names(), *self._clashes(), *self._unequal_budgets(), *self._untuned_grids()]
        if problems:
            raise ConfigurationError(*problems)

    def _unfit_names(self) -> Iterator[str]:
        for name in (self.name, *(choice.name for choice in (*self.models, *self.tasks, *self.methods))):
            if not NAME.fullmatch(name):
                yield f"the name {name!r} becomes a folder's: use letters, digits, and . _ + - after the first."

    def _clashes(self) -> Iterator[str]:
        """A flag has one place: two places would mean that one is silently ignored."""
        if len(set(self.seeds)) < len(self.seeds):
            yield f"seeds: {', '.join(map(str, self.seeds))} names one twice."
        for places in self._places():
            yield from _clashes_in_a_cell(places)

    def _places(self) -> Iterator[list[tuple[str, FlagValues]]]:
        """(where it is written, flags) of what comes together in a cell."""
        for model in self.models:
            for task in self.tasks:
                for method in self.methods:
                    yield [
                        ("flags", self.flags),
                        (f"models.{model.name}.flags", model.flags),
                        (f"tasks.{task.name}.flags", task.flags),
                        (f"methods.{method.name}.flags", method.flags),
                        (f"methods.{method.name}.grid", method.grid),
                    ]

    def _unequal_budgets(self) -> Iterator[str]:
        for method in self.methods:
            for flag in sorted({*method.flags, *method.grid} & set(BUDGET)):
                yield f"methods.{method.name}: --{flag} must be the same for all methods; put it under flags or tasks."
        sizes = {method.name: grid_size(method) for method in self.methods}
        if len(set(sizes.values())) > 1:
            told = ", ".join(f"{name} {size}" for name, size in sizes.items())
            yield f"all methods get the same number of tuning runs, but their grids hold: {told}."

    def _untuned_grids(self) -> Iterator[str]:
        """A grid is tuned by the validation loss, so there must be one."""
        if all(grid_size(method) == 1 for method in self.methods):
            return
        for model in self.models:
            for task in self.tasks:
                flags = {**self.flags, **model.flags, **task.flags}
                if not flags.keys() & set(VALIDATED):
                    yield (
                        f"tasks.{task.name}: a grid of several points is tuned by the validation loss, but with "
                        f"models.{model.name} nothing is validated: give --valid-data-path."
                    )


def _clashes_in_a_cell(places: Iterable[tuple[str, FlagValues]]) -> Iterator[str]:
    seen: dict[str, str] = {}
    for place, flag in ((place, flag) for place, flags in places for flag in flags):
        if flag in RUNNERS_OWN:
            yield f"{place}: --{flag} is the runner's own: {RUNNERS_OWN[flag]}."
        if flag in seen:
            yield f"--{flag} is in {seen[flag]} and in {place}: leave it in one of the two."
        seen.setdefault(flag, place)


def grid_size(method: Choice) -> int:
    """Number of points of the method's grid; 1 without a grid."""
    size = 1
    for values in method.grid.values():
        size *= len(values)
    return size


def budget(experiment: Experiment, model: Choice, task: Choice) -> FlagValues:
    """The flags, the same for all methods, that say how much each trains on and how."""
    flags = {**experiment.flags, **model.flags, **task.flags}
    return {flag: value for flag, value in flags.items() if flag in BUDGET}


def default_folder(experiment: Experiment) -> Path:
    return Path("runs/experiments") / experiment.name
