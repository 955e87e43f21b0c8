"""An experiment's YAML file: models x tasks x methods x seeds.

docs/experiments.md describes the file. A flag is written without its dashes. `true` is a switch that is given, `false`
and `null` leave a flag out, a list is a flag with several values; anything else is the flag's value.
"""

import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from difflib import get_close_matches
from itertools import product
from math import inf, prod
from os.path import realpath
from pathlib import Path
from re import findall, fullmatch
from typing import Any

from megatron_peft.config import ConfigurationError, require
from megatron_peft.config.untrusted import parse_yaml, read_text

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
    "lr-warmup-init lr-wsd-decay-iters lr-wsd-decay-samples lr-wsd-decay-style min-lr eval-iters eval-interval "
    "early-stopping-patience"
).split()
VALID_DATA = "valid-data-path"
DATA = ("train-data-path", VALID_DATA, "test-data-path", "data-path")
VALIDATED = {VALID_DATA, "data-path"}  # either gives a validation loss
ITEMS = "log-validation-items"  # the flag that keeps the loss of each validation sample
VALIDATION_LOSS, TEST_LOSS, AREA = "validation loss", "test loss", "area"  # metrics of every task: lower is better


@dataclass(frozen=True)
class Metric:
    """The mean of the numbers at `paths` of a score's JSON file (keys, joined by slashes), times `scale`: 100 for %.

    At a path there may be a list, the number of each test item, in place of their mean.
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

    grid: flag -> its values, for methods; of a rate those that are tried first.
    seeds: of final runs, for methods that have others than the experiment.
    tuning_flags: of tuning runs, in place of `flags`; for tasks that have other data for them.
    processes: of torchrun, for models; 1 starts plain python.
    score: for tasks; without it there is only the validation loss. scored_seeds: of the final runs that it scores.
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
    seeds: tuple[int, ...] = ()
    tuning_flags: FlagValues = field(default_factory=dict)
    scored_seeds: tuple[int, ...] = ()

    def score_of(self, seed: int) -> ScoreSpec | None:
        """What a task scores final runs of this seed with."""
        return self.score if seed in self.scored_seeds or not self.scored_seeds else None

    @property
    def num_points(self) -> int:
        """Points of the grid as it is written; 1 without a grid."""
        return prod(map(len, self.grid.values()))

    @property
    def peft_method(self) -> str:
        """A method's --peft-method."""
        return str(self.flags.get("peft-method", self.name))


@dataclass(frozen=True)
class Contrast:
    """A question that the file asks before there is an answer: `of` - `against`, the mean over the seeds of both.

    margin: differences below it are as good as none.
    """

    name: str
    of: str
    against: str
    metric: str
    margin: float


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
    contrasts: tuple[Contrast, ...] = ()

    def __post_init__(self) -> None:
        if problems := list(self._problems()):
            raise ConfigurationError(*problems)

    def _problems(self) -> Iterator[str]:
        for name in (self.name, *(choice.name for choice in (*self.models, *self.tasks, *self.methods))):
            if not fullmatch(NAME, name):
                yield f"the name {name!r} becomes a folder's: use letters, digits, and . _ + - after the first."
        for seeds in dict.fromkeys((self.seeds, *(method.seeds for method in self.methods))):
            if len(set(seeds)) < len(seeds):
                yield f"seeds: {', '.join(map(str, seeds))} names one twice."

        for task in self.tasks:
            if unknown := sorted({*task.scored_seeds} - {*self.all_seeds}):
                yield f"tasks.{task.name}.scored_seeds: {', '.join(map(str, unknown))} is no seed of a final run."

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
            if not is_validated and self._is_tuned:
                yield (
                    f"tasks.{task.name}: a grid of several points is tuned by the validation loss, but with "
                    f"models.{model.name} nothing is validated: give --valid-data-path."
                )
        yield from self._problems_of_evidence()

    def _problems_of_evidence(self) -> Iterator[str]:
        """What would make the answer to a contrast weaker than it looks."""
        seeds = {method.name: self.seeds_of(method) for method in self.methods}
        has_own_data = [task.name for task in self.tasks if task.tuning_flags]
        is_compared = self.contrasts and self._is_tuned
        if (is_compared or has_own_data) and any(self.tuning_seed in own for own in seeds.values()):
            why = "contrasts" if is_compared else f"tasks.{has_own_data[0]}.tuning_valid_data_path"
            yield (
                f"tuning_seed {self.tuning_seed} is among the seeds, but with {why} final runs are others than those "
                "that chose the settings: a setting is chosen because its run was lucky, too. Give another tuning_seed."
            )
        for model, task in product(self.models, self.tasks) if self.contrasts and self._is_tuned else ():
            flags = {**self.flags, **model.flags, **task.flags}
            of_finals = [word for flag in DATA for word in _listed(flags.get(flag, []))]
            tuning, others = _files(_listed(task.tuning_flags.get(VALID_DATA, []))), _files(of_finals)
            if not tuning or tuning & (others | _files(task.score.command if task.score else ())):
                yield (
                    f"tasks.{task.name}: contrasts need data that no setting was chosen by: give the task "
                    f"tuning_valid_data_path, with no file that trains, validates, tests or scores its final runs."
                )
        for contrast in self.contrasts:
            place, named = f"contrasts.{contrast.name}", (contrast.of, contrast.against)
            of, against = (set(seeds.get(name, ())) for name in named)
            if unknown := [name for name in named if name not in seeds]:
                yield f"{place}: {unknown[0]} is not a method; there are {', '.join(seeds)}."
            elif contrast.of == contrast.against or len(of & against) < 2:
                yield f"{place}: {' and '.join(named)} must be two methods that share two seeds at least."
            for task in self.tasks:
                known = [VALIDATION_LOSS, AREA, *(task.score.metrics if task.score else ())]
                known += [TEST_LOSS] if "test-data-path" in task.flags else []
                if contrast.metric not in known:
                    yield f"{place}: {contrast.metric} is no metric of {task.name}, which has {', '.join(known)}."
                elif task.score and contrast.metric in task.score.metrics:
                    if len([*filter(task.score_of, of & against)]) < 2 <= len(of & against):
                        yield f"{place}: tasks.{task.name}.scored_seeds must hold two seeds of both methods at least."
            if contrast.metric == VALIDATION_LOSS and self.flags.get(ITEMS) is not True:
                yield f"{place} compares the validation loss sample by sample: put {ITEMS}: true under flags."

    @property
    def _is_tuned(self) -> bool:
        return any(method.num_points > 1 for method in self.methods)

    def seeds_of(self, method: Choice) -> tuple[int, ...]:
        """The seeds of the method's final runs."""
        return method.seeds or self.seeds

    @property
    def all_seeds(self) -> tuple[int, ...]:
        """Those of any method."""
        return tuple(dict.fromkeys(seed for method in self.methods for seed in self.seeds_of(method)))

    @property
    def asked(self) -> dict[str, Any]:
        """Each contrast with the seeds of its methods, and the names of the places where they are asked.

        A record keeps them as they were when its run began.
        """
        seeds = {method.name: list(self.seeds_of(method)) for method in self.methods}
        asked = {each.name: {**asdict(each), "seeds": [seeds[each.of], seeds[each.against]]} for each in self.contrasts}
        places = product(self.tasks, self.models) if asked else ()
        return asked | {f"{task.name} with {model.name}": None for task, model in places}

    def budget(self, model: Choice, task: Choice) -> FlagValues:
        flags = {**self.flags, **model.flags, **task.flags}
        return {flag: value for flag, value in flags.items() if flag in BUDGET}


def span(counts: Iterable[int]) -> str:
    """The least and the greatest: `3 to 6`, or `3` if they are one."""
    of_all = sorted(set(counts))
    return " to ".join(map(str, dict.fromkeys((of_all[0], of_all[-1]))))


# The file is read strictly: an unknown key, a wrong type or an empty list is an error that names its place.

FILLED_IN = ("flags", "output", "checkpoints")  # in the command of a score
KEYS = ("name", "title", "flags", "models", "tasks", "methods", "seeds", "tuning_seed", "prepare", "contrasts")
CHOICE_KEYS = {
    "models": ("flags", "processes", "slurm", "paper"),
    "tasks": ("flags", "tuning_valid_data_path", "score", "scored_seeds", "paper"),
    "methods": ("flags", "grid", "seeds", "paper"),
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
        contrasts = tuple(_contrast(*each) for each in _mapping(top.get("contrasts"), "contrasts").items())
        return Experiment(name, title, flags, models, tasks, methods, seeds, tuning_seed, prepare, text, contrasts)
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
    seeds = _whole_numbers(values.get("seeds") or [], f"{place}.seeds")
    tuning = {VALID_DATA: path} if (path := values.get("tuning_valid_data_path")) else {}
    scored_seeds = _whole_numbers(values.get("scored_seeds") or [], f"{place}.scored_seeds")
    return Choice(name, flags, grid, processes, score, slurm, paper, seeds, tuning, scored_seeds)


def _contrast(name: str, content: Any) -> Contrast:
    place = f"contrasts.{name}"
    values = _mapping(content, place, ("of", "against", "metric", "margin"))
    for key in ("of", "against", "margin"):
        require(values.get(key) is not None, f"{place} needs {key}.")
    margin, metric = values["margin"], values.get("metric", VALIDATION_LOSS)
    is_number = type(margin) in (int, float) and 0 < margin < inf
    require(is_number, f"{place}.margin is {margin!r}; it is a number above 0, of which a difference is negligible.")
    return Contrast(str(name), str(values["of"]), str(values["against"]), str(metric), float(margin))


def _score(content: Any, place: str) -> ScoreSpec:
    values = _mapping(content, place, ("command", "metrics"))
    command = _words(values.get("command"), f"{place}.command")
    named = "{output}" in " ".join(command)
    require(named, f"{place}.command does not name its JSON file: write {{output}} in its place.")
    for name in (name for word in command for name in findall(r"(?<!\$)\{(\w+)\}", word) if name not in FILLED_IN):
        like = get_close_matches(name, FILLED_IN)
        told = f"{place}.command has {{{name}}}, which nothing fills in: did you mean {{{''.join(like[:1])}}}?"
        require(not like, told)
    metrics = {}
    for name, metric in _mapping(values.get("metrics"), f"{place}.metrics").items():
        metric_place = f"{place}.metrics.{name}"
        entry = _mapping(metric, metric_place, ("path", "higher_is_better", "scale"))
        paths, scale = tuple(map(str, _listed(entry.get("path") or []))), entry.get("scale", 1.0)
        problem = "needs path: the keys to the number, joined by slashes, or a list of such."
        require(bool(paths), f"{metric_place} {problem}")
        require(type(scale) in (int, float), f"{metric_place}.scale is {scale!r}, not a number.")
        metrics[str(name)] = Metric(paths, bool(entry.get("higher_is_better", True)), float(scale))
    require(bool(metrics), f"{place}.metrics is empty: name the numbers of the score's file.")
    return ScoreSpec(command, metrics)


def _words(content: Any, place: str) -> tuple[str, ...]:
    """Quotes mean what they mean to a shell: `bash -c 'sort a > b'` has three words."""
    try:
        words = shlex.split(content) if isinstance(content, str) else content
    except ValueError as error:
        raise ConfigurationError(f"{place} is {content!r}: {error}.") from error
    is_command = isinstance(words, Sequence) and bool(words)
    require(is_command, f"{place} is {content!r}; it is a command: a line, or a list of words.")
    return tuple(map(str, words))


def _whole_numbers(content: Any, place: str) -> tuple[int, ...]:
    for number in _listed(content):
        require(type(number) is int, f"{place} holds {number!r}, which is not a whole number.")
    return tuple(_listed(content))


def _files(words: Iterable[Any]) -> set[str]:
    """The files that these words may name, each written in one way."""
    return {realpath(str(word).rpartition("=")[2]) for word in words}


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
