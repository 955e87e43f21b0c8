"""An experiment's YAML file, models x tasks x methods x seeds, and its cells: the training runs that follow from it.

docs/experiments.md describes the file. A flag is written without its dashes. `true` is a switch that is given, `false`
and `null` leave a flag out, a list is a flag with several values; anything else is the flag's value.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from itertools import product
from math import prod
from pathlib import Path
from re import fullmatch
from typing import Any

from megatron_peft.cli.parser import read_config
from megatron_peft.config import ConfigurationError, PeftConfig, require
from megatron_peft.config import flag as dashed
from megatron_peft.config.untrusted import parse_yaml, read_text
from megatron_peft.models.families import read_shape

FlagValues = Mapping[str, Any]

EXPERIMENT_FILE = "experiment.yaml"  # a copy of the file, beside the cells
NAME = r"[A-Za-z0-9][A-Za-z0-9._+-]*"
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
VALIDATED = {"valid-data-path", "data-path"}  # either gives a validation loss


@dataclass(frozen=True)
class Metric:
    """The mean of the numbers at `paths` of a score's JSON file (keys, joined by slashes), times `scale`: 100 for %."""

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

    @property
    def num_points(self) -> int:
        """Points of the grid; 1 without a grid."""
        return prod(map(len, self.grid.values()))

    @property
    def peft_method(self) -> str:
        """A method's --peft-method."""
        return str(self.flags.get("peft-method", self.name))


@dataclass(frozen=True)
class Experiment:
    """The content of an experiment's file. `check_flags` checks its flags.

    Attributes: prepare: commands that run before the first cell; text: of the file, copied next to the cells.
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
        if problems := list(self._problems()):
            raise ConfigurationError(*problems)

    def _problems(self) -> Iterator[str]:
        for name in (self.name, *(choice.name for choice in (*self.models, *self.tasks, *self.methods))):
            if not fullmatch(NAME, name):
                yield f"the name {name!r} becomes a folder's: use letters, digits, and . _ + - after the first."
        if len(set(self.seeds)) < len(self.seeds):
            yield f"seeds: {', '.join(map(str, self.seeds))} names one twice."

        # A flag in two places of a cell: the first would be silently ignored.
        for model, task, method in product(self.models, self.tasks, self.methods):
            places = {
                "flags": self.flags,
                f"models.{model.name}.flags": model.flags,
                f"tasks.{task.name}.flags": task.flags,
                f"methods.{method.name}.flags": method.flags,
                f"methods.{method.name}.grid": method.grid,
            }
            first_place: dict[str, str] = {}
            for place, flag in ((place, flag) for place, flags in places.items() for flag in flags):
                if flag in RUNNERS_OWN:
                    yield f"{place}: --{flag} is the runner's own: {RUNNERS_OWN[flag]}."
                if flag in first_place:
                    yield f"--{flag} is in {first_place[flag]} and in {place}: leave it in one of the two."
                first_place.setdefault(flag, place)

        # The same budget for all methods, and a validation loss to choose by wherever there is a choice.
        for method in self.methods:
            for flag in sorted({*method.flags, *method.grid} & set(BUDGET)):
                yield f"methods.{method.name}: --{flag} must be the same for all methods; put it under flags or tasks."
        if len({method.num_points for method in self.methods}) > 1:
            listed = ", ".join(f"{method.name} {method.num_points}" for method in self.methods)
            yield f"all methods get the same number of tuning runs, but their grids hold: {listed}."
        for model, task in product(self.models, self.tasks):
            is_validated = VALIDATED & {*self.flags, *model.flags, *task.flags}
            if not is_validated and any(method.num_points > 1 for method in self.methods):
                yield (
                    f"tasks.{task.name}: a grid of several points is tuned by the validation loss, but with "
                    f"models.{model.name} nothing is validated: give --valid-data-path."
                )

    def budget(self, model: Choice, task: Choice) -> FlagValues:
        flags = {**self.flags, **model.flags, **task.flags}
        return {flag: value for flag, value in flags.items() if flag in BUDGET}


# The file is read strictly: an unknown key, a wrong type or an empty list is an error that names its place.

KEYS = ("name", "title", "flags", "models", "tasks", "methods", "seeds", "tuning_seed", "prepare")
CHOICE_KEYS = {
    "models": ("flags", "processes", "slurm", "paper"),
    "tasks": ("flags", "score", "paper"),
    "methods": ("flags", "grid", "paper"),
}


def read_experiment(path: Path) -> Experiment:
    """The experiment of a file, by default named like it.

    Raises ConfigurationError: the file cannot be read, is not YAML, has an unknown key, or contradicts itself.
    """
    text = read_text(path)
    content = parse_yaml(text, str(path))
    try:
        top = _mapping(content, "the file", KEYS)
        if missing := [key for key in (*CHOICE_KEYS, "seeds") if not top.get(key)]:
            raise ConfigurationError(*(f"the grid is empty: {key} names nothing." for key in missing))
        flags = _flags(top.get("flags"), "flags")
        models, tasks, methods = (
            tuple(_choice(str(name), values, kind, flags) for name, values in _mapping(top[kind], kind).items())
            for kind in CHOICE_KEYS
        )
        seeds = _whole_numbers(top["seeds"], "seeds")
        (tuning_seed,) = _whole_numbers(top.get("tuning_seed", seeds[0]), "tuning_seed")
        prepare = tuple(_words(command, "prepare") for command in _listed(top.get("prepare") or []))
        name = str(top.get("name", path.stem))
        title = str(top.get("title", name))
        return Experiment(name, title, flags, models, tasks, methods, seeds, tuning_seed, prepare, text)
    except ConfigurationError as error:
        raise ConfigurationError(*(f"{path}: {problem}" for problem in error.problems)) from error


def _choice(name: str, content: Any, kind: str, common: Mapping[str, Any]) -> Choice:
    """`common`: the flags of all cells. Without --peft-method in any flags, a method's name is its --peft-method."""
    place = f"{kind}.{name}"
    values = _mapping(content, place, CHOICE_KEYS[kind])
    flags, grid, slurm = (_flags(values.get(key), f"{place}.{key}") for key in ("flags", "grid", "slurm"))
    grid = {flag: tuple(_listed(points)) for flag, points in grid.items()}
    for flag, points in grid.items():
        require(bool(points), f"{place}.grid.{flag} is empty: list the values to try, or leave the flag out.")
        words = [str(point) for point in points]
        twice = sorted({word for word in words if words.count(word) > 1})
        require(not twice, f"{place}.grid.{flag} holds {', '.join(twice)} twice.")
    if kind == "methods" and "peft-method" not in {*flags, *grid, *common}:
        flags = {"peft-method": name, **flags}
    (processes,) = _whole_numbers(values.get("processes", 1), f"{place}.processes")
    require(processes >= 1, f"{place}.processes is {processes}; a cell needs one at least.")
    score = _score(values["score"], f"{place}.score") if values.get("score") else None
    paper = None if values.get("paper") is None else str(values["paper"])
    return Choice(name, flags, grid, processes, score, slurm, paper)


def _score(content: Any, place: str) -> ScoreSpec:
    values = _mapping(content, place, ("command", "metrics"))
    command = _words(values.get("command"), f"{place}.command")
    named = "{output}" in " ".join(command)
    require(named, f"{place}.command does not name its JSON file: write {{output}} in its place.")
    metrics = {}
    for name, metric in _mapping(values.get("metrics"), f"{place}.metrics").items():
        metric_place = f"{place}.metrics.{name}"
        entry = _mapping(metric, metric_place, ("path", "higher_is_better", "scale"))
        paths, scale = tuple(map(str, _listed(entry.get("path") or []))), entry.get("scale", 1.0)
        told = "needs path: the keys to the number, joined by slashes, or a list of such."
        require(bool(paths), f"{metric_place} {told}")
        require(type(scale) in (int, float), f"{metric_place}.scale is {scale!r}, not a number.")
        metrics[str(name)] = Metric(paths, bool(entry.get("higher_is_better", True)), float(scale))
    require(bool(metrics), f"{place}.metrics is empty: name the numbers of the score's file.")
    return ScoreSpec(command, metrics)


def _words(content: Any, place: str) -> tuple[str, ...]:
    words = content.split() if isinstance(content, str) else content
    is_command = isinstance(words, Sequence) and bool(words)
    require(is_command, f"{place} is {content!r}; it is a command: a line, or a list of words.")
    return tuple(map(str, words))


def _whole_numbers(content: Any, place: str) -> tuple[int, ...]:
    for number in _listed(content):
        require(type(number) is int, f"{place} holds {number!r}, which is not a whole number.")
    return tuple(_listed(content))


def _listed(content: Any) -> list[Any]:
    return content if isinstance(content, list) else [content]


def _flags(content: Any, place: str) -> dict[str, Any]:
    return {str(name).lstrip("-").replace("_", "-"): value for name, value in _mapping(content, place).items()}


def _mapping(content: Any, place: str, keys: Sequence[str] = ()) -> Mapping[str, Any]:
    """Raises ConfigurationError: not a mapping, or a key that is not among `keys`."""
    content = {} if content is None else content
    is_mapping = isinstance(content, Mapping)
    require(is_mapping, f"{place} is {content!r}; it is a mapping, `name: value` on each line.")
    for key in content if keys else ():
        near = get_close_matches(str(key), keys, 1)
        hint = f"did you mean {near[0]}?" if near else f"the keys are {', '.join(keys)}."
        require(key in keys, f"{place} has the unknown key {key!r}: {hint}")
    return content


# Each cell is one training run: a model on a task by a method at one point of its grid.


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
    """The cells of one method, model and task: the grid with the tuning seed, then the best point with all seeds."""

    model: Choice
    task: Choice
    method: Choice
    tuning: tuple[Cell, ...]
    finals: tuple[tuple[Cell, ...], ...]  # of each point of the grid, a cell for each seed

    @property
    def name(self) -> tuple[str, str, str]:
        return self.model.name, self.task.name, self.method.name

    @property
    def key(self) -> str:
        """The same as --group takes it."""
        return ",".join(self.name)

    @property
    def cells(self) -> dict[str, Cell]:
        """All cells by key: a tuning cell may be a final one too."""
        return {cell.key: cell for cells in (self.tuning, *self.finals) for cell in cells}


def groups(experiment: Experiment) -> list[Group]:
    """All groups of the experiment, in the order of its file."""

    def group(model: Choice, task: Choice, method: Choice) -> Group:
        def cell(point: Mapping[str, Any], seed: int) -> Cell:
            flags = {**experiment.flags, **model.flags, **task.flags, **method.flags, **point, "seed": seed}
            settings = {name: str(value) for name, value in point.items()}
            return Cell(model.name, task.name, method.name, settings, seed, command_line(flags), model.processes)

        points = [dict(zip(method.grid, values, strict=True)) for values in product(*method.grid.values())]
        tuning = tuple(cell(point, experiment.tuning_seed) for point in points)
        finals = tuple(tuple(cell(point, seed) for seed in experiment.seeds) for point in points)
        return Group(model, task, method, tuning, finals)

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


def check_flags(groups: Iterable[Group]) -> None:
    """Check the flags of every cell by the rules of pretrain_peft.py. ConfigurationError has each problem once, with
    the first cell that has it.
    """
    first_with: dict[str, str] = {}
    for cell in (cell for group in groups for cell in group.tuning):
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
