"""The results of an experiment: what is done of each group of cells, what comes next, and how methods compare."""

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any, Literal, NamedTuple

from megatron_peft.config import ConfigurationError, require
from megatron_peft.experiment import cell_record, cells, spec
from megatron_peft.experiment.cell_record import CellRecord
from megatron_peft.experiment.cells import Cell, Group
from megatron_peft.experiment.process import has_checkpoint
from megatron_peft.experiment.spec import VALIDATION_LOSS, Choice, Experiment, FlagValues, ScoreSpec

MOST_MISFITS = 3  # in an error


@dataclass(frozen=True)
class Result:
    """What a method reached on a task with a model so far.

    group: with the points that were added to its grid, or are to be added next.
    records: by key, of all of its cells.
    best: the chosen point of the grid, None before all that the file names were tried.
    untried: tuning cells that are to run, in order.
    edges: flags whose rate at the chosen point is the lowest or highest that was tried.
    """

    model: str
    task: str
    method: str
    group: Group
    records: Mapping[str, CellRecord]
    best: int | None
    untried: tuple[Cell, ...]
    edges: tuple[str, ...]

    @property
    def tuning(self) -> list[tuple[Cell, CellRecord | None]]:
        """The points that the file names, and the added ones that were tried."""
        points = [(cell, self.records.get(cell.key)) for cell in self.group.tuning]
        first = self.group.method.num_points
        return [*points[:first], *(each for each in points[first:] if each[1])]

    @property
    def why_not_tuned(self) -> str:
        """Empty if every point of the grid was trained, and the best rate has a worse one on both sides."""
        if self.edges:
            return "the best rate is the lowest or highest that was tried"
        all_trained = all(record is not None and record.is_trained for _, record in self.tuning)
        is_tuned = not self.untried and (all_trained or len(self.group.points) == 1)
        return "" if is_tuned else "points of the grid failed or are missing"

    @property
    def is_tuned(self) -> bool:
        return not self.why_not_tuned

    @property
    def chosen(self) -> tuple[Cell, ...]:
        return () if self.best is None else self.group.finals[self.best]

    @property
    def chosen_point(self) -> str:
        """The settings of the chosen point, and whether they are tuned."""
        if self.best is None:
            return ""
        suffix = "" if self.is_tuned else ", not tuned"
        return (self.group.tuning[self.best].point or "(no grid)") + suffix

    @property
    def finals(self) -> dict[int, CellRecord]:
        """Seed -> trained record of the chosen point."""
        records = {cell.seed: self.records.get(cell.key) for cell in self.chosen}
        return {seed: record for seed, record in records.items() if record is not None and record.is_trained}

    @property
    def num_scored(self) -> int:
        """Final runs with every number of the task's score."""
        scores = {seed: self.group.task.score_of(seed) for seed in self.finals}
        return sum(score is not None and self.finals[seed].has_scores(score) for seed, score in scores.items())

    @property
    def is_done(self) -> bool:
        """Whether all final runs are trained, and those scored that the task scores."""
        to_score = sum(self.group.task.score_of(cell.seed) is not None for cell in self.chosen)
        trained = len(self.finals)
        return trained > 0 and trained == len(self.chosen) and self.num_scored == to_score and not self.untried

    def seeds_of(self, metric: str) -> set[int]:
        """Seeds whose final runs are to have the metric: all, or of a score those that the task scores."""
        task = self.group.task
        is_score = task.score is not None and metric in task.score.metrics
        return {seed for seed in self.group.seeds if not is_score or task.score_of(seed)}

    def values(self, metric: str) -> dict[int, float]:
        """Seed -> the metric's value, of the runs that have it."""
        values = {seed: record.value(metric) for seed, record in self.finals.items()}
        return {seed: value for seed, value in values.items() if value is not None}


def same_runs(results: Iterable[Result]) -> list[list[Result]]:
    """The results in order; those whose final runs are the same, curve by curve, in one list."""
    found: list[tuple[dict[int, Any], list[Result]]] = []
    for result in results:
        curves = {seed: record.curves for seed, record in result.finals.items()}
        same = next((group for other, group in found if curves and curves == other and all(curves.values())), None)
        if same is not None:
            same.append(result)
        else:
            found.append((curves, [result]))
    return [group for _, group in found]


def progress(folder: Path, group: Group, gave_up: Set[str] | None = frozenset()) -> Result:
    """What the records in `folder` say of a group.

    The point with the least validation loss at the end of its run is chosen, the first of equals, whatever the scores.
    While a rate of it is at the edge of the grid, a point beyond joins the grid. Which ones follows from the losses, so
    records that were made in any order give the same grid.

    Args: gave_up: keys of cells that failed in this runner; a grid is complete without them. None, for readers: those
    whose record says so, and of an incomplete grid the point that has final runs is the chosen one.
    """
    records: dict[str, CellRecord] = {}
    added: Sequence[FlagValues] = ()
    edges: Sequence[str] = ()
    while True:
        for key, cell in group.cells.items():
            if key not in records and (record := cell_record.read_cell_record(folder, cell)):
                records[key] = record
        losses: dict[int, float] = {}
        untried: list[Cell] = []
        is_single = len(group.points) == 1  # it is chosen in any case
        for at, cell in enumerate(group.tuning):
            record = records.get(cell.key)
            if record is not None and record.is_trained:
                loss = math.inf if record.validation_loss is None else record.validation_loss
                if is_single or math.isfinite(loss):
                    losses[at] = loss
            elif record is None if gave_up is None else cell.key not in gave_up:
                untried.append(cell)
        is_first = not added  # of a version whose grids did not grow there are final runs, though points are untried
        best = None if is_first and untried else min(losses, key=losses.__getitem__, default=None)
        if best is None and gave_up is None:
            with_finals = [at for at in range(len(group.points)) if _has_final_runs(group, at, records)]
            best = min(with_finals, key=lambda at: losses.get(at, math.inf), default=None)
        added = []
        if best in losses and not untried:
            added, edges = group.beyond(best)
        if not added:
            return Result(*group.name, group, records, best, tuple(untried), tuple(edges))
        group = replace(group, points=(*group.points, *added))


def _has_final_runs(group: Group, at: int, records: Mapping[str, CellRecord]) -> bool:
    """Return True if a final run of the point is trained that was not made by tuning."""
    keys = {cell.key for cell in group.finals[at]} - {group.tuning[at].key}
    return any(key in records and records[key].is_trained for key in keys)


class Work(NamedTuple):
    """A cell to train, or a trained one to score."""

    kind: Literal["train", "score"]
    cell: Cell
    score: ScoreSpec | None = None


def work(folder: Path, group: Group, gave_up: Set[str] = frozenset()) -> Iterator[Work]:
    """The work of the group that can start now, in order. A cell without a checkpoint is trained before scoring.

    It follows from the records alone, so a new runner continues where a killed one stopped. A group's grid runs with
    the tuning seed, until it has grown around the best point; then the seeds of that are run, and all of them scored.
    """
    now = progress(folder, group, gave_up)
    finals = () if now.untried else now.chosen
    yield from (Work("train", cell) for cell in now.untried)
    for cell in finals:
        record = now.records.get(cell.key)
        if cell.key not in gave_up and (record is None or not record.is_trained):
            yield Work("train", cell)
    for cell in finals:
        record, score = now.finals.get(cell.seed), group.task.score_of(cell.seed)
        if score and record and cell.key not in gave_up and not record.has_scores(score):
            is_there = has_checkpoint(folder, cell, record.iterations)  # and not of a training that is to be repeated
            yield Work("score", cell, score) if is_there else Work("train", cell)


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
        return {key: record for result in self.all for key, record in result.records.items()}


def metrics(task: Choice) -> dict[str, bool]:
    """Name -> whether higher is better."""
    scores = task.score.metrics if task.score else {}
    losses = [VALIDATION_LOSS, *([spec.AREA] if task.tuning_flags else [])]
    tested = {spec.TEST_LOSS: False} if "test-data-path" in task.flags else {}
    higher = {name: metric.higher_is_better for name, metric in scores.items()}
    return dict.fromkeys(losses, False) | higher | tested


def shown_metrics(task: Choice) -> list[str]:
    """The scores of a task; with the validation loss where it chose no setting, or is all there is."""
    is_result = task.score is None or task.tuning_flags
    return [metric for metric in metrics(task) if metric != VALIDATION_LOSS or is_result]


def read_results(folder: Path, experiment_file: Path | None = None) -> Results:
    """The results in `folder`, of the experiment's file there or another one.

    Raises ConfigurationError: no such file, it has no cell, a record does not match the file or was edited, or two
    cells have read different data.
    """
    file = experiment_file or folder / spec.EXPERIMENT_FILE
    require(file.exists(), f"{file} is not there: name the experiment's YAML file with --experiment.")
    experiment = spec.read_experiment(file)
    of_groups = tuple(progress(folder, group, gave_up=None) for group in cells.groups(experiment))
    if problems := [
        f"{path} does not belong to {file}: {'; '.join(differences)}. Remove it and run megatron-peft "
        f"experiment, which runs it again, or name the file that it came from with --experiment."
        for result in of_groups
        for cell in result.group.cells.values()
        if (path := cell_record.cell_file(folder, cell)).exists()
        and (differences := cell_record.misfits(cell, result.group.task.score, cell_record.read_file(path)))
    ]:
        more = [f"... and {len(problems) - MOST_MISFITS} more."] if len(problems) > MOST_MISFITS else []
        raise ConfigurationError(*problems[:MOST_MISFITS], *more)
    results = Results(experiment, of_groups)

    keys_of_data: dict[str, dict[str, list[str]]] = {}  # path -> digest -> keys of cells
    for key, record in results.records().items():
        for source in record.provenance.values():
            for path, digest in source["data_sha256"].items():
                keys_of_data.setdefault(path, {}).setdefault(digest, []).append(key)
    if problems := [
        f"{path} was not the same for all cells: {digest[:12]} for {', '.join(dict.fromkeys(keys))}. Remove those, "
        "or the other cells, and run megatron-peft experiment, which runs them again."
        for path, keys_of_digest in keys_of_data.items()
        for digest, keys in list(keys_of_digest.items())[1:]
    ]:
        raise ConfigurationError(*problems)
    has_any = bool(results.records())
    require(has_any, f"{folder}/cells contains no results of {file}: run megatron-peft experiment first.")
    return results


def copy_results(results: Results, folder: Path) -> None:
    """Write the cells and the experiment's file to `folder`, from which the same report can be made."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / spec.EXPERIMENT_FILE).write_text(results.experiment.text, encoding="utf-8")
    for result in results.all:
        for key, record in result.records.items():
            cell_record.write_record(folder, result.group.cells[key], record)


class StepsTo(NamedTuple):
    """How a method reaches a reference's loss after `steps` steps: `num_reached` of its `num_runs` runs do.

    `times_fewer` is `steps` over the mean number of steps that they need, None if none does; a lower bound
    (`is_bound`) if a run had reached it at its first measurement.
    """

    steps: int
    times_fewer: float | None
    is_bound: bool
    num_reached: int
    num_runs: int

    def __str__(self) -> str:
        if self.times_fewer is None:
            return f"not reached (0/{self.num_runs})"
        if self.num_reached < self.num_runs:  # those that arrive are the faster ones
            return f"{self.num_reached}/{self.num_runs} reach it"
        return f"{'≥ ' if self.is_bound else ''}{self.times_fewer:.2f}"


def crossing(curve: Sequence[tuple[float, float]], loss: float) -> tuple[float, bool] | None:
    """(first iteration, linear between measurements, at which the loss is reached; whether it is only a bound).

    Args: curve: (iteration, validation loss), by iteration.
    """
    for (before_at, before), (at, value) in pairwise([(0.0, math.inf), *curve]):
        if value <= loss and math.isinf(before):
            return at, value < loss
        if value <= loss:
            return before_at + (before - loss) / (before - value) * (at - before_at), False
    return None


def steps_to(runs: Mapping[int, CellRecord], reference: Mapping[int, CellRecord]) -> list[StepsTo]:
    """Entries by steps, for runs that are paired by seed.

    They are the measurements that all of the reference's runs have and at which the mean of their losses is the lowest
    so far: a later loss that is higher is no goal, since every run had it earlier.
    """
    seeds = sorted(runs.keys() & reference.keys())
    curves, targets = (
        {
            seed: [(iteration, loss) for iteration, _, loss in records[seed].curves.get("validation_loss", ())]
            for seed in seeds
        }
        for records in (runs, reference)
    )
    compared, lowest = [], math.inf
    measured = [{at for at, _ in target} for target in targets.values()]
    for steps in sorted(set.intersection(*measured)) if seeds else ():
        target_loss = mean(dict(targets[seed])[steps] for seed in seeds)
        if target_loss >= lowest:
            continue
        lowest = target_loss
        crossings = [crossing(curves[seed], dict(targets[seed])[steps]) for seed in seeds]
        reached = [step for step in crossings if step is not None]
        times = steps / mean(at for at, _ in reached) if reached else None
        is_bound = any(is_bound for _, is_bound in reached)
        compared.append(StepsTo(int(steps), times, is_bound, len(reached), len(crossings)))
    return compared


CONFIDENCE = 0.95


class Comparison(NamedTuple):
    """A paired t-test over the seeds that both methods have: same data order, same draws.

    `difference` is the mean of (this method - the reference), from `low` to `high` with 95% confidence; `p` is
    two-sided and not corrected for the number of comparisons.
    """

    difference: float
    low: float
    high: float
    p: float


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
    return Comparison(difference, float(interval.low), float(interval.high), float(test.pvalue))
