"""The results of an experiment: for each model, task and method the tried settings, and the runs of the best."""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean

from megatron_peft.config import ConfigurationError
from megatron_peft.experiment import process
from megatron_peft.experiment.cells import Cell, Group, groups
from megatron_peft.experiment.record import (
    CellRecord,
    cell_file,
    misfits,
    progress,
    read_cell_record,
    read_file,
    write_record,
)
from megatron_peft.experiment.runner import EXPERIMENT_FILE
from megatron_peft.experiment.spec import Choice, Experiment, read_experiment

VALIDATION_LOSS = "validation loss"
MOST_MISFITS = 3  # in an error


@dataclass(frozen=True)
class Result:
    """One method on one task with one model.

    Attributes:
        tuning: (cell, its record or None) of each point of the grid.
        finals: trained records of the chosen point, by seed; fewer than the seeds while the experiment runs.
        settings: of the chosen point.
        records: by key, of all of its cells.
    """

    group: Group
    tuning: tuple[tuple[Cell, CellRecord | None], ...]
    finals: Mapping[int, CellRecord]
    settings: Mapping[str, str]
    records: Mapping[str, CellRecord]

    @property
    def model(self) -> str:
        """Its name."""
        return self.group.model.name

    @property
    def task(self) -> str:
        """Its name."""
        return self.group.task.name

    @property
    def method(self) -> str:
        """Its name."""
        return self.group.method.name

    def values(self, metric: str) -> dict[int, float]:
        """Seed -> the metric's value, of the runs that have one."""
        found = {
            seed: record.validation_loss if metric == VALIDATION_LOSS else record.scores.get(metric)
            for seed, record in self.finals.items()
        }
        return {seed: value for seed, value in found.items() if value is not None}


@dataclass(frozen=True)
class Results:
    """All of an experiment, in the order of its file."""

    experiment: Experiment
    all: tuple[Result, ...]

    def of(self, model: str, task: str) -> list[Result]:
        """The results of each method, for one model and task."""
        return [result for result in self.all if (result.model, result.task) == (model, task)]

    def places(self) -> list[tuple[str, str]]:
        """(model, task) with at least one final run."""
        return list(dict.fromkeys((result.model, result.task) for result in self.all if result.finals))

    def records(self) -> dict[str, CellRecord]:
        """The record of each cell that has one, by key."""
        return {key: record for result in self.all for key, record in result.records.items()}

    def num_finals(self) -> tuple[int, int]:
        """(finished final runs, final runs of the whole experiment)."""
        return sum(len(result.finals) for result in self.all), len(self.all) * len(self.experiment.seeds)


def metrics(task: Choice) -> dict[str, bool]:
    """Name -> whether higher is better."""
    scores = task.score.metrics if task.score else {}
    return {VALIDATION_LOSS: False, **{name: metric.higher_is_better for name, metric in scores.items()}}


def peft_method(method: Choice) -> str:
    """The method's --peft-method."""
    return str(method.flags.get("peft-method", method.name))


def read_results(folder: Path, experiment_file: Path | None = None) -> Results:
    """The results in `folder`, of the experiment's file there or another one.

    Raises ConfigurationError: no such file, it has no cell, a record does not match the file or was edited, or two
    cells have read different data.
    """
    source = experiment_file or folder / EXPERIMENT_FILE
    if not source.exists():
        raise ConfigurationError(f"{source} is not there: name the experiment's YAML file with --experiment.")
    experiment = read_experiment(source)
    _refuse_misfits(folder, groups(experiment), source)
    found = Results(experiment, tuple(_result(folder, group) for group in groups(experiment)))
    _refuse_other_data(found)
    if not any(record for result in found.all for _, record in result.tuning):
        raise ConfigurationError(f"{folder}/cells contains no results of {source}: run megatron-peft experiment first.")
    return found


def _refuse_misfits(folder: Path, all_groups: list[Group], source: Path) -> None:
    """Raises ConfigurationError for records that do not match the file."""
    problems = [
        f"{path} does not belong to {source}: {'; '.join(differences)}. Remove it and run megatron-peft "
        f"experiment, which runs it again, or name the file that it came from with --experiment."
        for group in all_groups
        for cell in _cells(group).values()
        if (path := cell_file(folder, cell)).exists()
        and (differences := misfits(cell, group.task.score, read_file(path)))
    ]
    if problems:
        more = [f"... and {len(problems) - MOST_MISFITS} more."] if len(problems) > MOST_MISFITS else []
        raise ConfigurationError(*problems[:MOST_MISFITS], *more)


def _refuse_other_data(results: Results) -> None:
    """Raises ConfigurationError if cells have read different data."""
    read: dict[str, dict[str, list[str]]] = {}
    for key, record in results.records().items():
        for path, digest in ((p, d) for source in record.provenance.values() for p, d in source["data_sha256"].items()):
            read.setdefault(path, {}).setdefault(digest, []).append(key)
    problems = [
        f"{path} was not the same for all cells: {digest[:12]} for {', '.join(dict.fromkeys(keys))}. Remove those, "
        "or the other cells, and run megatron-peft experiment, which runs them again."
        for path, keys_of in read.items()
        for digest, keys in list(keys_of.items())[1:]
    ]
    if problems:
        raise ConfigurationError(*problems)


def _cells(group: Group) -> dict[str, Cell]:
    """By key: a tuning cell may be a final one too."""
    return {cell.key: cell for cells in (group.tuning, *group.finals) for cell in cells}


def copy_results(results: Results, folder: Path) -> None:
    """Write the cells and the experiment's file to `folder`, from which the same report can be made."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / EXPERIMENT_FILE).write_text(results.experiment.text, encoding="utf-8")
    for result in results.all:
        cells = _cells(result.group)
        for key, record in result.records.items():
            write_record(folder, cells[key], record)


def _result(folder: Path, group: Group) -> Result:
    now = progress(folder, group)
    records = {
        key: _with_lambdas(folder, cell, record)
        for key, cell in _cells(group).items()
        if (record := read_cell_record(folder, cell)) is not None
    }
    tuning = tuple((cell, records.get(cell.key)) for cell in group.tuning)
    if now.best is None:
        return Result(group, tuning, {}, {}, records)
    finals = {
        cell.seed: records[cell.key]
        for cell in group.finals[now.best]
        if cell.key in records and records[cell.key].is_trained
    }
    return Result(group, tuning, finals, dict(group.tuning[now.best].settings), records)


def _with_lambdas(folder: Path, cell: Cell, record: CellRecord) -> CellRecord:
    """The record, with the lambdas of its run if it was written without them."""
    return record if record.lambdas else replace(record, lambdas=process.lambdas(folder, cell))


Curve = Sequence[tuple[float, float]]  # (iteration, validation loss), by iteration


@dataclass(frozen=True)
class StepsTo:
    """How a method reaches a reference's loss after `steps` steps.

    Attributes:
        times_fewer: `steps` over the mean number of steps that the method needs; None if no run reaches the loss.
        is_bound: a run had reached it at its first measurement, so `times_fewer` is a lower bound.
        num_reached: of `num_runs`; the mean is over these.
    """

    steps: int
    times_fewer: float | None
    is_bound: bool
    num_reached: int
    num_runs: int


def crossing(curve: Curve, loss: float) -> tuple[float, bool] | None:
    """(first iteration, linear between measurements, at which the loss is reached; whether it is only a bound)."""
    before: tuple[float, float] | None = None
    for at, value in curve:
        if value <= loss:
            if before is None:
                return at, value < loss
            share = (before[1] - loss) / (before[1] - value)
            return before[0] + share * (at - before[0]), False
        before = at, value
    return None


def steps_to(runs: Mapping[int, CellRecord], reference: Mapping[int, CellRecord]) -> list[StepsTo]:
    """One for each measurement that all of the reference's runs have; runs are paired by seed."""
    seeds = sorted(runs.keys() & reference.keys())
    if not seeds:
        return []
    targets = {seed: dict(validation_curve(reference[seed])) for seed in seeds}
    shared = sorted(set.intersection(*(set(target) for target in targets.values())))
    curves = {seed: validation_curve(runs[seed]) for seed in seeds}
    return [_at(steps, [crossing(curves[seed], targets[seed][steps]) for seed in seeds]) for steps in shared]


def validation_curve(record: CellRecord) -> list[tuple[float, float]]:
    """(iteration, validation loss) in the order of the run."""
    return [(iteration, loss) for iteration, _, loss in record.curves.get("validation_loss", ())]


def _at(steps: float, crossings: Sequence[tuple[float, bool] | None]) -> StepsTo:
    reached = [found for found in crossings if found is not None]
    times = steps / mean(at for at, _ in reached) if reached else None
    return StepsTo(int(steps), times, any(is_bound for _, is_bound in reached), len(reached), len(crossings))


CONFIDENCE = 0.95


@dataclass(frozen=True)
class Comparison:
    """A paired t-test over the seeds that both methods have: same data order, same draws.

    Attributes:
        difference: mean of (this method - the reference).
        low, high: its 95% confidence interval.
        p: two-sided; not corrected for the number of comparisons.
        num_pairs: at least two.
    """

    difference: float
    low: float
    high: float
    p: float
    num_pairs: int


def compare_seeds(values: Mapping[int, float], reference: Mapping[int, float]) -> Comparison | None:
    """Args: seed -> value. None: fewer than two seeds in common, or differences that are all the same (no spread)."""
    from scipy.stats import ttest_rel  # of the extra `report`: whoever draws no report can do without it

    seeds = sorted(values.keys() & reference.keys())
    if len(seeds) < 2:
        return None
    ours, theirs = [values[seed] for seed in seeds], [reference[seed] for seed in seeds]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of differences without spread: answered below
        test = ttest_rel(ours, theirs)
        interval = test.confidence_interval(CONFIDENCE)
    difference = sum(a - b for a, b in zip(ours, theirs, strict=True)) / len(seeds)
    if not math.isfinite(test.statistic):
        return None
    return Comparison(difference, float(interval.low), float(interval.high), float(test.pvalue), len(seeds))
