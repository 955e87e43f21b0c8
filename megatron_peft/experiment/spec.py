"""An experiment's YAML file: models x tasks x methods, a grid for each method, seeds. docs/experiments.md describes it.

A flag is written without its dashes. `true` is a switch that is given, `false` and `null` leave a flag out, a list is
a flag with several values; anything else is the flag's value.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from megatron_peft.config import ConfigurationError
from megatron_peft.config.untrusted import parse_yaml, read_text

FlagValues = Mapping[str, Any]

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")
RUNNERS_OWN = {  # flag -> what to write instead
    "seed": "list the seeds under seeds:",
    "save": "each cell has a folder of its own",
    "load": "a cell that was stopped continues by itself",
}
BUDGET = (  # the same for all methods, for a fair comparison
    "train-iters train-samples train-epochs global-batch-size seq-length pack-sequences overlong "
    "train-data-path valid-data-path test-data-path data-path split optimizer bf16 clip-grad micro-batch-size "
    "lr-decay-style lr-decay-iters lr-decay-samples lr-warmup-iters lr-warmup-samples lr-warmup-fraction "
    "lr-warmup-init min-lr eval-iters eval-interval early-stopping-patience"
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
class ScoreSpec:
    """How to score a trained cell. `command` may contain {output}, {checkpoints} and, as a separate word, {flags}."""

    command: tuple[str, ...]
    metrics: Mapping[str, Metric]


@dataclass(frozen=True)
class Choice:
    """A model, a task or a method: its name, and the flags that it adds.

    Attributes:
        grid: flag -> its values, for methods.
        processes: of torchrun, for models; 1 starts plain python.
        score: for tasks; without it there is only the validation loss.
        slurm: options of sbatch, for models.
        paper: the column, benchmark or method of the paper's Table I that reports show beside it.
    """

    name: str
    flags: FlagValues
    grid: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    processes: int = 1
    score: ScoreSpec | None = None
    slurm: FlagValues = field(default_factory=dict)
    paper: str | None = None


@dataclass(frozen=True)
class Experiment:
    """The content of an experiment's file. `check_flags` checks its flags.

    Attributes:
        seeds: of the final runs; tuning_seed: of the tuning runs.
        prepare: commands that run before the first cell.
        text: of the file, which the runner copies next to the cells.
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
        """A flag in two places: one of them would be silently ignored."""
        if len(set(self.seeds)) < len(self.seeds):
            yield f"seeds: {', '.join(map(str, self.seeds))} names one twice."
        for places in self._places():
            yield from _clashes_in_a_cell(places)

    def _places(self) -> Iterator[list[tuple[str, FlagValues]]]:
        """For each cell, (place in the file, flags) of all that it combines."""
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
            listed = ", ".join(f"{name} {size}" for name, size in sizes.items())
            yield f"all methods get the same number of tuning runs, but their grids hold: {listed}."

    def _untuned_grids(self) -> Iterator[str]:
        """A grid without a validation loss to choose by."""
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
    """The flags of BUDGET, which are the same for all methods."""
    flags = {**experiment.flags, **model.flags, **task.flags}
    return {flag: value for flag, value in flags.items() if flag in BUDGET}


def default_folder(experiment: Experiment) -> Path:
    """Where an experiment's cells go unless --output names a folder."""
    return Path("runs/experiments") / experiment.name


KEYS = ("name", "title", "flags", "models", "tasks", "methods", "seeds", "tuning_seed", "prepare")
NEEDED = ("models", "tasks", "methods", "seeds")
CHOICE_KEYS = {
    "models": ("flags", "processes", "slurm", "paper"),
    "tasks": ("flags", "score", "paper"),
    "methods": ("flags", "grid", "paper"),
}
METRIC_KEYS = ("path", "higher_is_better", "scale")


def read_experiment(path: Path) -> Experiment:
    """The experiment of a file, by default named like it.

    Raises ConfigurationError: the file cannot be read, is not YAML, has an unknown key, or contradicts itself.
    """
    text = read_text(path)
    content = parse_yaml(text, str(path))
    try:
        return replace(_experiment(content, path.stem), text=text)
    except ConfigurationError as error:
        raise ConfigurationError(*(f"{path}: {problem}" for problem in error.problems)) from error


def _experiment(content: Any, name: str) -> Experiment:
    top = _mapping(content, "the file")
    _check_keys(top, KEYS, "the file")
    missing = [key for key in NEEDED if not top.get(key)]
    if missing:
        raise ConfigurationError(*(f"the grid is empty: {key} names nothing." for key in missing))
    seeds = _whole_numbers(top["seeds"], "seeds")
    (tuning_seed,) = _whole_numbers([top.get("tuning_seed", seeds[0])], "tuning_seed")
    return Experiment(
        name=str(top.get("name", name)),
        title=str(top.get("title", top.get("name", name))),
        flags=_flags(top.get("flags"), "flags"),
        models=_choices(top, "models"),
        tasks=_choices(top, "tasks"),
        methods=_choices(top, "methods"),
        seeds=seeds,
        tuning_seed=tuning_seed,
        prepare=tuple(_words(command, "prepare") for command in _listed(top.get("prepare"))),
    )


def _choices(top: Mapping[str, Any], kind: str) -> tuple[Choice, ...]:
    common = _flags(top.get("flags"), "flags")
    return tuple(
        _choice(str(name), _mapping(values, f"{kind}.{name}"), kind, common)
        for name, values in _mapping(top[kind], kind).items()
    )


def _choice(name: str, values: Mapping[str, Any], kind: str, common: Mapping[str, Any]) -> Choice:
    """`common`: the flags of all cells. Without --peft-method in any flags, a method's name is its --peft-method."""
    place = f"{kind}.{name}"
    _check_keys(values, CHOICE_KEYS[kind], place)
    flags = _flags(values.get("flags"), f"{place}.flags")
    grid = {flag: _grid_values(points, f"{place}.grid.{flag}") for flag, points in _grid(values, place).items()}
    if kind == "methods" and "peft-method" not in {*flags, *grid, *common}:
        flags = {"peft-method": name, **flags}
    (processes,) = _whole_numbers([values.get("processes", 1)], f"{place}.processes")
    if processes < 1:
        raise ConfigurationError(f"{place}.processes is {processes}; a cell needs one at least.")
    score = _score(values["score"], f"{place}.score") if values.get("score") else None
    paper = None if values.get("paper") is None else str(values["paper"])
    return Choice(name, flags, grid, processes, score, _flags(values.get("slurm"), f"{place}.slurm"), paper)


def _grid(values: Mapping[str, Any], place: str) -> Mapping[str, Any]:
    return _flags(values.get("grid"), f"{place}.grid")


def _grid_values(points: Any, place: str) -> tuple[Any, ...]:
    listed = points if isinstance(points, list) else [points]
    if not listed:
        raise ConfigurationError(f"{place} is empty: list the values to try, or leave the flag out.")
    words = [str(point) for point in listed]
    twice = sorted({word for word in words if words.count(word) > 1})
    if twice:
        raise ConfigurationError(f"{place} holds {', '.join(twice)} twice.")
    return tuple(listed)


def _score(content: Any, place: str) -> ScoreSpec:
    values = _mapping(content, place)
    _check_keys(values, ("command", "metrics"), place)
    command = _words(values.get("command"), f"{place}.command")
    if "{output}" not in " ".join(command):
        raise ConfigurationError(f"{place}.command does not name its JSON file: write {{output}} in its place.")
    metrics = _mapping(values.get("metrics"), f"{place}.metrics")
    if not metrics:
        raise ConfigurationError(f"{place}.metrics is empty: name the numbers of the score's file.")
    return ScoreSpec(command, {str(name): _metric(one, f"{place}.metrics.{name}") for name, one in metrics.items()})


def _metric(content: Any, place: str) -> Metric:
    values = _mapping(content, place)
    _check_keys(values, METRIC_KEYS, place)
    paths = values.get("path") or []
    if not paths:
        raise ConfigurationError(f"{place} needs path: the keys to the number, joined by slashes, or a list of such.")
    scale = values.get("scale", 1.0)
    if isinstance(scale, bool) or not isinstance(scale, int | float):
        raise ConfigurationError(f"{place}.scale is {scale!r}, not a number.")
    keys = tuple(map(str, paths)) if isinstance(paths, list) else (str(paths),)
    return Metric(keys, bool(values.get("higher_is_better", True)), float(scale))


def _words(content: Any, place: str) -> tuple[str, ...]:
    if isinstance(content, str) and content.strip():
        content = content.split()
    if not isinstance(content, Sequence) or isinstance(content, str) or not content:
        raise ConfigurationError(f"{place} is {content!r}; it is a command: a line, or a list of words.")
    return tuple(str(word) for word in content)


def _listed(commands: Any) -> list[Any]:
    """One command or several."""
    return commands if isinstance(commands, list) else [commands] if commands else []


def _flags(content: Any, place: str) -> dict[str, Any]:
    return {str(name).lstrip("-").replace("_", "-"): value for name, value in _mapping(content, place).items()}


def _mapping(content: Any, place: str) -> Mapping[str, Any]:
    if content is None:
        return {}
    if not isinstance(content, Mapping):
        raise ConfigurationError(f"{place} is {content!r}; it is a mapping, `name: value` on each line.")
    return content


def _whole_numbers(content: Any, place: str) -> tuple[int, ...]:
    listed = content if isinstance(content, list) else [content]
    for number in listed:
        if not isinstance(number, int) or isinstance(number, bool):
            raise ConfigurationError(f"{place} holds {number!r}, which is not a whole number.")
    return tuple(listed)


def _check_keys(given: Iterable[Any], known: Sequence[str], place: str) -> None:
    for key in given:
        if key not in known:
            near = get_close_matches(str(key), known, 1)
            hint = f"did you mean {near[0]}?" if near else f"the keys are {', '.join(known)}."
            raise ConfigurationError(f"{place} has the unknown key {key!r}: {hint}")
