"""The cells of an experiment: each is one training run, of a model on a task by a method at one point of its grid."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import product
from pathlib import Path
from typing import Any

from megatron_peft.cli.parser import read_config
from megatron_peft.config import ConfigurationError, PeftConfig, flag
from megatron_peft.experiment.spec import Choice, Experiment
from megatron_peft.models.families import read_shape


@dataclass(frozen=True)
class Cell:
    """One training run.

    Attributes:
        settings: flag -> value, the point of the grid.
        flags: all flags of pretrain_peft.py but --save and --load.
        processes: number of ranks.
    """

    model: str
    task: str
    method: str
    settings: Mapping[str, str]
    seed: int
    flags: tuple[str, ...]
    processes: int = 1

    @property
    def key(self) -> str:
        """Names the cell; valid in a file's name."""
        point = "".join(f",{name}={value}" for name, value in self.settings.items())
        return f"{self.model},{self.task},{self.method}{point},seed={self.seed}".replace("/", "_").replace(" ", "_")


@dataclass(frozen=True)
class Group:
    """The cells of one method, model and task: the grid with the tuning seed, then the best point with all seeds."""

    model: Choice
    task: Choice
    method: Choice
    tuning: tuple[Cell, ...]
    finals: tuple[tuple[Cell, ...], ...]  # of each point of the grid, a cell for each seed

    @property
    def name(self) -> tuple[str, str, str]:
        """Model, task and method."""
        return self.model.name, self.task.name, self.method.name

    @property
    def key(self) -> str:
        """The same as --group takes it."""
        return ",".join(self.name)


def groups(experiment: Experiment) -> list[Group]:
    """All groups of the experiment, in the order of its file."""
    return [
        _group(experiment, *choices) for choices in product(experiment.models, experiment.tasks, experiment.methods)
    ]


def group_named(all_groups: Sequence[Group], key: str) -> Group:
    """Raises ConfigurationError: no group of the experiment is MODEL,TASK,METHOD."""
    for group in all_groups:
        if group.key == key:
            return group
    raise ConfigurationError(f"--group {key}: there are {'; '.join(group.key for group in all_groups)}.")


def _group(experiment: Experiment, model: Choice, task: Choice, method: Choice) -> Group:
    points = list(_points(method))

    def cell(point: Mapping[str, Any], seed: int) -> Cell:
        flags = {**experiment.flags, **model.flags, **task.flags, **method.flags, **point, "seed": seed}
        settings = {name: str(value) for name, value in point.items()}
        return Cell(model.name, task.name, method.name, settings, seed, command_line(flags), model.processes)

    return Group(
        model,
        task,
        method,
        tuple(cell(point, experiment.tuning_seed) for point in points),
        tuple(tuple(cell(point, seed) for seed in experiment.seeds) for point in points),
    )


def _points(method: Choice) -> Iterator[dict[str, Any]]:
    for values in product(*method.grid.values()):
        yield dict(zip(method.grid, values, strict=True))


def command_line(flags: Mapping[str, Any]) -> tuple[str, ...]:
    """`{"lr": 0.1, "bf16": True, "split": None, "x": [1, 2]}` -> --lr 0.1 --bf16 --x 1 2."""
    words: list[str] = []
    for name, value in flags.items():
        if value is None or value is False:
            continue
        words.append(f"--{name}")
        if value is not True:
            words += [str(word) for word in value] if isinstance(value, list | tuple) else [str(value)]
    return tuple(words)


MODEL_FLAG = "--pretrained-checkpoint"


def check_flags(groups: Iterable[Group]) -> None:
    """Check the flags of every cell by the rules of pretrain_peft.py, before anything runs.

    Raises ConfigurationError with each problem once, and the first cell that has it.
    """
    first_with: dict[str, str] = {}
    for cell in (cell for group in groups for cell in group.tuning):
        for problem in flag_problems(cell):
            first_with.setdefault(problem, cell.key)
    if first_with:
        raise ConfigurationError(*(f"{key}: {problem}" for problem, key in first_with.items()))


def flag_problems(cell: Cell) -> tuple[str, ...]:
    """The errors that pretrain_peft.py would report for the cell's flags, and a grid over a flag without effect."""
    # A model that prepare: makes, or that is on a cluster's disk, is checked by its own run.
    read = read_shape if _model_is_here(cell) else None
    try:
        config = read_config([*cell.flags, "--save", "the cell's own"], {"WORLD_SIZE": str(cell.processes)}, read)
    except ConfigurationError as error:
        return error.problems
    read_by_method = config.peft.spec.fields(config.peft)
    of_methods = {
        spelling: one.name for one in fields(PeftConfig) for spelling in one.metadata["flags"] or (flag(one.name),)
    }
    return tuple(
        f"methods.{cell.method}.grid: --{name} has no effect with {config.peft.spec.describe(config.peft)}, so the "
        f"grid would run equal cells: take it out."
        for name in cell.settings
        if of_methods.get(f"--{name}", "method") not in read_by_method
    )


def _model_is_here(cell: Cell) -> bool:
    if MODEL_FLAG not in cell.flags[:-1]:
        return False
    folder = cell.flags[cell.flags.index(MODEL_FLAG) + 1]
    return Path(folder, "config.json").is_file()
