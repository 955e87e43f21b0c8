"""The results of an experiment: what is done of each group of cells, what comes next, and the runs that count."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

from megatron_peft.config import ConfigurationError, require
from megatron_peft.experiment import cells, spec
from megatron_peft.experiment.cells import Cell, Group
from megatron_peft.experiment.process import has_checkpoint
from megatron_peft.experiment.records import CELLS, PARQUET, CellRecord, cell_file, read_records, write_parquet
from megatron_peft.experiment.spec import VALIDATION_LOSS, Choice, Experiment, FlagValues, ScoreSpec

Records = Mapping[str, CellRecord]  # by the cell's key
MAX_MISFITS = 3  # in an error


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
    records: Records
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
    def chosen(self) -> tuple[Cell, ...]:
        return () if self.best is None else self.group.finals[self.best]

    @property
    def chosen_point(self) -> str:
        """The settings of the chosen point, and whether they are tuned."""
        if self.best is None:
            return ""
        return (self.group.tuning[self.best].point or "(no grid)") + (", not tuned" if self.why_not_tuned else "")

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
        """True if all final runs are trained, and those scored that the task scores."""
        to_score = sum(self.group.task.score_of(cell.seed) is not None for cell in self.chosen)
        trained = len(self.finals)
        return trained > 0 and trained == len(self.chosen) and self.num_scored == to_score and not self.untried

    def seeds_of(self, metric: str) -> set[int]:
        """Return the seeds whose final runs are to have the metric: all, or of a score those that the task scores."""
        task = self.group.task
        is_score = task.score is not None and metric in task.score.metrics
        return {seed for seed in self.group.seeds if not is_score or task.score_of(seed)}

    def values(self, metric: str) -> dict[int, float]:
        """Return seed -> the metric's value, of the runs that have it."""
        values = {seed: record.value(metric) for seed, record in self.finals.items()}
        return {seed: value for seed, value in values.items() if value is not None}


def same_runs(results: Iterable[Result]) -> list[list[Result]]:
    """Return the results in order; those whose final runs are the same, curve by curve, in one list."""
    found: list[list[Result]] = []
    for result in results:
        curves = {seed: record.curves for seed, record in result.finals.items()}
        for others in found if curves and all(curves.values()) else ():
            if curves == {seed: record.curves for seed, record in others[0].finals.items()}:
                others.append(result)
                break
        else:
            found.append([result])
    return found


def progress(records: Records, group: Group, gave_up: Set[str] | None = frozenset()) -> Result:
    """Return what the records say of a group.

    The point with the least validation loss at the end of its run is chosen, the first of equals, whatever the scores.
    While a rate of it is at the edge of the grid, a point beyond joins the grid. Which ones follows from the losses, so
    records that were made in any order give the same grid.

    Args: gave_up: keys of cells that failed in this runner; a grid is complete without them. None, for readers: those
    whose record says so, and of an incomplete grid the point that has final runs is the chosen one.
    """
    added: Sequence[FlagValues] = ()
    edges: Sequence[str] = ()
    while True:
        known = {
            key: record
            for key, cell in group.cells.items()
            if (record := records.get(key)) and (record.flags, record.processes) == (cell.flags, cell.processes)
        }
        losses: dict[int, float] = {}
        untried: list[Cell] = []
        is_single = len(group.points) == 1  # it is chosen in any case
        for at, cell in enumerate(group.tuning):
            record = known.get(cell.key)
            if record is not None and record.is_trained:
                loss = math.inf if record.validation_loss is None else record.validation_loss
                if is_single or math.isfinite(loss):
                    losses[at] = loss
            elif record is None if gave_up is None else cell.key not in gave_up:
                untried.append(cell)
        is_first = not added  # of a version whose grids did not grow there are final runs, though points are untried
        best = None if is_first and untried else min(losses, key=losses.__getitem__, default=None)
        if best is None and gave_up is None:
            with_finals = [at for at in range(len(group.points)) if _has_final_runs(group, at, known)]
            best = min(with_finals, key=lambda at: losses.get(at, math.inf), default=None)
        added = []
        if best in losses and not untried:
            added, edges = group.beyond(best)
        if not added:
            return Result(*group.name, group, known, best, tuple(untried), tuple(edges))
        group = replace(group, points=(*group.points, *added))


def _has_final_runs(group: Group, at: int, records: Records) -> bool:
    """Return True if a final run of the point is trained that was not made by tuning."""
    keys = {cell.key for cell in group.finals[at]} - {group.tuning[at].key}
    return any(key in records and records[key].is_trained for key in keys)


class Work(NamedTuple):
    """A cell to train, or a trained one to score."""

    kind: Literal["train", "score"]
    cell: Cell
    score: ScoreSpec | None = None


def work(folder: Path, records: Records, group: Group, gave_up: Set[str] = frozenset()) -> Iterator[Work]:
    """Yield the work of the group that can start now, in order. A cell without a checkpoint is trained before scoring.

    It follows from the records alone, so a new runner continues where a killed one stopped. A group's grid runs with
    the tuning seed, until it has grown around the best point; then the seeds of that are run, and all of them scored.
    """
    now = progress(records, group, gave_up)
    finals = () if now.untried else [cell for cell in now.chosen if cell.key not in gave_up]
    yield from (Work("train", cell) for cell in now.untried)
    yield from (Work("train", cell) for cell in finals if cell.seed not in now.finals)
    for cell in finals:
        record, score = now.finals.get(cell.seed), group.task.score_of(cell.seed)
        if score and record and not record.has_scores(score):
            is_there = has_checkpoint(folder, cell, record.iterations)  # and not of a training that is to be repeated
            yield Work("score", cell, score) if is_there else Work("train", cell)


@dataclass(frozen=True)
class Results:
    """All of an experiment, in the order of its file."""

    experiment: Experiment
    all: tuple[Result, ...]

    def of(self, model: str, task: str) -> list[Result]:
        """Return the results of each method, for one model and task."""
        return [result for result in self.all if (result.model, result.task) == (model, task)]

    def places(self) -> list[tuple[str, str]]:
        """Return (model, task) with at least one final run."""
        return list(dict.fromkeys((result.model, result.task) for result in self.all if result.finals))

    def records(self) -> dict[str, CellRecord]:
        return {key: record for result in self.all for key, record in result.records.items()}


def metrics(task: Choice) -> dict[str, bool]:
    """Return the metrics of a task's runs, and whether higher is better."""
    scores = task.score.metrics if task.score else {}
    losses = [VALIDATION_LOSS, *([spec.AREA] if task.tuning_flags else [])]
    tested = {spec.TEST_LOSS: False} if "test-data-path" in task.flags else {}
    return dict.fromkeys(losses, False) | {name: metric.higher_is_better for name, metric in scores.items()} | tested


def shown_metrics(task: Choice) -> list[str]:
    """Return the scores of a task; with the validation loss where it chose no setting, or is all there is."""
    is_result = task.score is None or task.tuning_flags
    return [metric for metric in metrics(task) if metric != VALIDATION_LOSS or is_result]


def is_experiment_folder(folder: Path) -> bool:
    """Return True if a runner or a report has left its cells there."""
    return (folder / CELLS).is_dir() or (folder / PARQUET).is_file()


def read_results(folder: Path, experiment_file: Path | None = None) -> Results:
    """Return the results in `folder`, of the experiment's file there or another one.

    Raises ConfigurationError: no such file, it has no cell, a record does not match the file, or two cells have read
    different data.
    """
    file = experiment_file or folder / spec.EXPERIMENT_FILE
    require(file.exists(), f"{file} is not there: name the experiment's YAML file with --experiment.")
    experiment, records = spec.read_experiment(file), read_records(folder)
    results = Results(experiment, tuple(progress(records, each, gave_up=None) for each in cells.groups(experiment)))
    if problems := [
        f"{cell_file(folder, cell)} does not belong to {file}: {difference}. Remove it and run megatron-peft "
        f"experiment, which runs it again, or name the file that it came from with --experiment."
        for result in results.all
        for key, cell in result.group.cells.items()
        if key in records and (difference := _difference(records[key], cell, result.group.task.score))
    ]:
        more = [f"... and {len(problems) - MAX_MISFITS} more."] if len(problems) > MAX_MISFITS else []
        raise ConfigurationError(*problems[:MAX_MISFITS], *more)

    keys_of_data: dict[str, dict[str, list[str]]] = {}  # path -> digest -> keys of cells
    for key, record in results.records().items():
        for path, digest in record.data.items():
            keys_of_data.setdefault(path, {}).setdefault(digest, []).append(key)
    if problems := [
        f"{path} was not the same for all cells: {digest[:12]} for {', '.join(keys)}. Remove those, or the other "
        "cells, and run megatron-peft experiment, which runs them again."
        for path, keys_of_digest in keys_of_data.items()
        for digest, keys in list(keys_of_digest.items())[1:]
    ]:
        raise ConfigurationError(*problems)
    require(bool(results.records()), f"{folder} contains no results of {file}: run megatron-peft experiment first.")
    return results


def _difference(record: CellRecord, cell: Cell, score: ScoreSpec | None) -> str:
    """Return how a record differs from the cell of the experiment's file; empty if it does not."""
    if record.processes != cell.processes:
        return f"processes is {record.processes} and {cell.processes} in the file"
    if record.flags != cell.flags:
        ran, wanted = (
            {part.split()[0]: part.partition(" ")[2] or "given" for part in f" {' '.join(flags)}".split(" --")[1:]}
            for flags in (record.flags, cell.flags)
        )
        return (
            "; ".join(
                f"--{flag} is {ran.get(flag, 'absent')} and {wanted.get(flag, 'absent')} in the file"
                for flag in sorted(ran.keys() | wanted.keys())
                if ran.get(flag) != wanted.get(flag)
            )
            or "its flags are in another order than in the file"
        )
    if record.is_trained and record.scores and score and not record.has_scores(score):
        return "its score was produced by another command or of other numbers than the file's"
    return ""


def copy_results(results: Results, folder: Path) -> None:
    """Write the cells and the experiment's file to `folder`, from which the same report can be made."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / spec.EXPERIMENT_FILE).write_text(results.experiment.text, encoding="utf-8")
    write_parquet(folder / PARQUET, results.records().values())
