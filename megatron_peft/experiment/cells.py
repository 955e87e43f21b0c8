"""The cells of an experiment: training runs of a model on a task by a method at one point of its grid."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import pairwise, product
from math import nan
from pathlib import Path
from typing import Any

from megatron_peft.cli.parser import read_config
from megatron_peft.config import ConfigurationError, PeftConfig
from megatron_peft.config import flag as dashed
from megatron_peft.experiment.spec import Choice, Experiment, FlagValues
from megatron_peft.models.families import read_shape

MOST_ADDED = 6  # values that a rate's grid may gain on a side


@dataclass(frozen=True)
class Cell:
    """One training run: `settings` is the point of the grid, `flags` are all but --save and --load."""

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

    @property
    def point(self) -> str:
        """The point of the grid, as `lr=0.1 lora-rank=4`; empty without a grid."""
        return " ".join(f"{name}={value}" for name, value in self.settings.items())


@dataclass(frozen=True)
class Group:
    """The cells of one method, model and task: the grid with the tuning seed, then the best point with all seeds.

    flags: of all of its cells; points: of the grid, with those that were added to it; seeds: of the final runs.
    """

    model: Choice
    task: Choice
    method: Choice
    flags: FlagValues
    points: tuple[FlagValues, ...]
    seeds: tuple[int, ...]
    tuning_seed: int

    @property
    def name(self) -> tuple[str, str, str]:
        return self.model.name, self.task.name, self.method.name

    @property
    def key(self) -> str:
        """The same as --group takes it."""
        return ",".join(self.name)

    @cached_property
    def tuning(self) -> tuple[Cell, ...]:
        return tuple(self._cell(point, self.tuning_seed, is_tuning=True) for point in self.points)

    @cached_property
    def finals(self) -> tuple[tuple[Cell, ...], ...]:
        """A cell for each seed, of each point of the grid."""
        return tuple(tuple(self._cell(point, seed) for seed in self.seeds) for point in self.points)

    @property
    def cells(self) -> dict[str, Cell]:
        """All cells by key: a tuning cell may be a final one too."""
        return {cell.key: cell for cells in (self.tuning, *self.finals) for cell in cells}

    def _cell(self, point: FlagValues, seed: int, is_tuning: bool = False) -> Cell:
        flags = {**self.flags, **(self.task.tuning_flags if is_tuning else {}), **point, "seed": seed}
        settings = {name: str(value) for name, value in point.items()}
        return Cell(*self.name, settings, seed, command_line(flags), self.model.processes)

    def beyond(self, at: int) -> tuple[list[FlagValues], list[str]]:
        """(Points to add, flags): where a rate of point `at` is the lowest or highest that was tried with its others.

        Without points for a flag, its rate has been followed as far as `MOST_ADDED` allows.
        """
        best, added, flags = self.points[at], [], []
        for flag, written in self.method.grid.items():
            rates = sorted(map(_number, written))
            if len(rates) < 2 or "lr" not in flag.split("-") or not all(rate > 0 for rate in rates):
                continue
            ratios = [high / low for low, high in pairwise(rates)]
            ratio = ratios[0] if max(ratios) < 1.001 * min(ratios) else 2.0
            most = ratio ** (MOST_ADDED + 0.5)
            near = [_number(p[flag]) for p in self.points if {**p, flag: None} == {**best, flag: None}]
            rate = _number(best[flag])
            for new, is_edge in ((rate / ratio, rate == min(near)), (rate * ratio, rate == max(near))):
                flags += [flag] if is_edge else []
                if is_edge and rates[0] / most < new < rates[-1] * most:
                    added.append({**best, flag: f"{new:.6g}"})
        return added, flags


def _number(value: Any) -> float:
    """NaN of a word."""
    with suppress(ValueError):
        return float(str(value))
    return nan


def groups(experiment: Experiment) -> list[Group]:
    """All groups of the experiment, in the order of its file, with the grids as they are written."""

    def group(model: Choice, task: Choice, method: Choice) -> Group:
        flags = {**experiment.flags, **model.flags, **task.flags, **method.flags}
        points = tuple(dict(zip(method.grid, values, strict=True)) for values in product(*method.grid.values()))
        return Group(model, task, method, flags, points, experiment.seeds_of(method), experiment.tuning_seed)

    return [group(*choices) for choices in product(experiment.models, experiment.tasks, experiment.methods)]


def command_line(flags: FlagValues) -> tuple[str, ...]:
    """`{"lr": 0.1, "bf16": True, "split": None, "x": [1, 2]}` -> --lr 0.1 --bf16 --x 1 2."""
    words: list[str] = []
    for name, value in flags.items():
        if value is None or value is False:
            continue
        words.append(f"--{name}")
        if value is not True:
            words += [str(word) for word in value] if isinstance(value, list | tuple) else [str(value)]
    return tuple(words)


def check_flags(groups: Sequence[Group]) -> None:
    """Check the flags of every cell by the rules of pretrain_peft.py. ConfigurationError has each problem once, with
    the first cell that has it.
    """
    first_with: dict[str, str] = {}
    final = (group.finals[0][0] for group in groups if group.task.tuning_flags)
    for cell in (*(cell for group in groups for cell in group.tuning), *final):
        for problem in _flag_problems(cell):
            first_with.setdefault(problem, cell.key)
    if first_with:
        raise ConfigurationError(*(f"{key}: {problem}" for problem, key in first_with.items()))


def _flag_problems(cell: Cell) -> tuple[str, ...]:
    """The errors that pretrain_peft.py would report for the cell's flags, and a grid over a flag without effect."""
    # A model that prepare: makes, or that is on a cluster's disk, is checked by its own run.
    words = dict(zip(cell.flags, cell.flags[1:], strict=False))
    is_here = "--pretrained-checkpoint" in words and Path(words["--pretrained-checkpoint"], "config.json").is_file()
    environment = {"WORLD_SIZE": str(cell.processes)}
    try:
        config = read_config([*cell.flags, "--save", "the cell's own"], environment, read_shape if is_here else None)
    except ConfigurationError as error:
        return error.problems
    read_by_method = config.peft.spec.fields(config.peft)
    names = {word: each.name for each in fields(PeftConfig) for word in each.metadata["flags"] or (dashed(each.name),)}
    return tuple(
        f"methods.{cell.method}.grid: --{name} has no effect with {config.peft.spec.describe(config.peft)}, so the "
        f"grid would run equal cells: take it out."
        for name in cell.settings
        if names.get(f"--{name}", "method") not in read_by_method
    )
