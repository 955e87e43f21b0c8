"""Runs the missing cells, a few at a time, and writes a record of each.

The runner has no state of its own: `record.work` derives the next cell from the records. A cell that fails is reported,
recorded and tried again by the next call.
"""

import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean
from types import FrameType
from typing import Any

from rich.console import Console
from rich.console import Group as Stack
from rich.live import Live
from rich.table import Table
from rich.text import Text

from megatron_peft.checkpoint.folders import FolderLock
from megatron_peft.config import ConfigurationError
from megatron_peft.config.untrusted import read_json
from megatron_peft.experiment import process
from megatron_peft.experiment.cells import Cell, Group
from megatron_peft.experiment.record import (
    CellProgress,
    CellRecord,
    Work,
    from_metrics,
    losses_of_grid,
    of_cell,
    progress,
    read_cell_record,
    score_source,
    trainable_parameters,
    training_source,
    work,
    write_record,
)
from megatron_peft.experiment.spec import Experiment, ScoreSpec
from megatron_peft.training.metrics import METRICS_FILE, read_metrics

EXPERIMENT_FILE = "experiment.yaml"  # a copy of the experiment's file, next to the cells
LOCKS = "locks"  # of runners of single groups
POLL_SECONDS = 0.2
PATIENCE_SECONDS = 60  # a run that is stopped saves first

Report = Callable[[str], None]


@dataclass
class Runner:
    """One call of the runner on one folder.

    Attributes:
        jobs: cells at a time.
        report: called with a sentence at each event; refresh: called each time that the running cells are polled.
        program: the training program, as words after `python`; None is `megatron-peft train`.
        keep_checkpoints: keep the checkpoints of finished cells.
        experiment: the text of the experiment's file.
        gave_up: keys of the cells that failed in this call.
        running: what runs now.
        begun: the record of each running cell at the start of its process, with the provenance of its numbers.
    """

    folder: Path
    groups: Sequence[Group]
    jobs: int = 1
    report: Report = print
    refresh: "Callable[[Runner], None]" = lambda runner: None
    program: Sequence[str] | None = None
    keep_checkpoints: bool = False
    experiment: str = ""
    gave_up: set[str] = field(default_factory=set)
    running: dict[str, tuple[Work, process.Running]] = field(default_factory=dict)
    begun: dict[str, CellRecord] = field(default_factory=dict)
    _stopped_by: int | None = None

    def run(self) -> bool:
        """Run all that is missing; returns whether all cells are done.

        Raises KeyboardInterrupt on SIGINT and SIGTERM, after its cells have ended.
        """
        with self._signals():
            while self._stopped_by is None and (self._start_what_fits() or self.running):
                self.refresh(self)
                time.sleep(POLL_SECONDS)
                self._collect()
            self._end_cells()
        self.refresh(self)
        if self._stopped_by is not None:
            raise KeyboardInterrupt
        return not [group for group in self.groups if not self._is_done(group)]

    def _is_done(self, group: Group) -> bool:
        """Whether nothing failed; reports a grid without a finite validation loss."""
        keys = {cell.key for cell in group.tuning}
        if progress(self.folder, group, self.gave_up).best is None and not keys & self.gave_up:
            self.report(f"FAILED: {group.key}: no point of its grid ended with a finite validation loss")
            return False
        return not self.gave_up & (keys | {cell.key for finals in group.finals for cell in finals})

    def _start_what_fits(self) -> bool:
        """Whether anything was started."""
        started = False
        for todo in self._work():
            if len(self.running) >= self.jobs:
                break
            self._start(todo)
            started = True
        return started

    def _work(self) -> Iterator[Work]:
        for group in self.groups:
            for todo in work(self.folder, group, self._has_checkpoint, self.gave_up):
                if todo.cell.key not in self.running:
                    yield todo

    def _has_checkpoint(self, cell: Cell) -> bool:
        return process.has_checkpoint(self.folder, cell)

    def _start(self, todo: Work) -> None:
        folder = process.run_folder(self.folder, todo.cell)
        if todo.kind == "train":
            command = process.training_command(self.folder, todo.cell, self.program or process.PROGRAM)
            if "--load" not in command:
                shutil.rmtree(folder, ignore_errors=True)
        else:
            assert todo.score is not None
            process.score_file(self.folder, todo.cell).unlink(missing_ok=True)
            command = process.score_command(self.folder, todo.cell, todo.score)
        self.report(f"{todo.kind} {todo.cell.key}")
        self.begun[todo.cell.key] = self._begin(todo)
        self.running[todo.cell.key] = todo, process.start(command, folder / process.LOG)

    def _begin(self, todo: Work) -> CellRecord:
        """Called before the process starts: the commit and the data may change until it ends."""
        if todo.kind == "train":
            source = training_source(self.experiment, todo.cell)
            return of_cell(todo.cell, "failed", provenance={"training": source})
        record = read_cell_record(self.folder, todo.cell)
        assert record is not None and todo.score is not None
        source = score_source(self.experiment, todo.cell, todo.score)
        return replace(record, provenance={**record.provenance, "score": source})

    def _collect(self) -> None:
        for key, (todo, running) in list(self.running.items()):
            if running.process.poll() is None:
                continue
            del self.running[key]
            if self._stopped_by is None:
                self._finish(todo, running)

    def _finish(self, todo: Work, running: process.Running) -> None:
        try:
            if running.process.returncode != 0:
                raise ConfigurationError(f"{_how_it_ended(running.process.returncode)}: {running.last_words()}")
            summary = self._trained(todo.cell, running) if todo.kind == "train" else self._scored(todo, running)
        except ConfigurationError as error:
            self._failed(todo, running, str(error))
            return
        done = {"train": "trained", "score": "scored"}[todo.kind]
        self.report(f"{done} {todo.cell.key} in {running.seconds:.0f} s: {summary}")

    def _trained(self, cell: Cell, running: process.Running) -> str:
        path = process.checkpoints_folder(self.folder, cell) / METRICS_FILE
        records = read_metrics(path) if path.exists() else []
        if not records:
            raise ConfigurationError(f"it ended well, but left no {path}")
        record = replace(
            self.begun[cell.key],
            status="trained",
            started_at=running.started_at,
            seconds=running.seconds,
            trainable_parameters=trainable_parameters(running.log.read_text(encoding="utf-8", errors="replace")),
            lambdas=process.lambdas(self.folder, cell),
            **from_metrics(records),
        )
        write_record(self.folder, cell, record)
        self._remove_checkpoints(cell)
        return f"validation loss {_shown(record.validation_loss)}"

    def _scored(self, todo: Work, running: process.Running) -> str:
        assert todo.score is not None
        scores = read_scores(process.score_file(self.folder, todo.cell), todo.score)
        values = {"scores": scores, "score_command": todo.score.command, "score_seconds": running.seconds}
        record = replace(self.begun[todo.cell.key], **values)
        write_record(self.folder, todo.cell, record)
        self._remove_checkpoints(todo.cell)
        return ", ".join(f"{name} {_shown(value)}" for name, value in scores.items())

    def _failed(self, todo: Work, running: process.Running, reason: str) -> None:
        self.gave_up.add(todo.cell.key)
        self.report(f"FAILED: {todo.kind} {todo.cell.key}: {reason}\n  all of it: {running.log}")
        if todo.kind == "train":
            values = {"started_at": running.started_at, "seconds": running.seconds, "reason": reason}
            write_record(self.folder, todo.cell, replace(self.begun[todo.cell.key], **values))

    def _remove_checkpoints(self, cell: Cell) -> None:
        """Remove those of the finished cells of the group, once its grid is complete."""
        group = next(group for group in self.groups if group.name == (cell.model, cell.task, cell.method))
        todo = list(work(self.folder, group, self._has_checkpoint))
        if self.keep_checkpoints or any(one.kind == "train" and one.cell in group.tuning for one in todo):
            return
        needed = {one.cell.key for one in todo} | self.running.keys()
        for one in (*group.tuning, *(final for finals in group.finals for final in finals)):
            if one.key not in needed:
                _remove_all_but_metrics(process.checkpoints_folder(self.folder, one))

    def _end_cells(self) -> None:
        for _, running in self.running.values():
            running.stop()
        for key, (_, running) in self.running.items():
            try:
                running.process.wait(PATIENCE_SECONDS)
            except subprocess.TimeoutExpired:
                running.process.kill()
            self.report(f"stopped {key}")
        self.running.clear()

    @contextmanager
    def _signals(self) -> Iterator[None]:
        def note(number: int, frame: FrameType | None) -> None:
            self._stopped_by = number

        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def run_group(experiment: Experiment, folder: Path, group: Group, **settings: Any) -> bool:
    """Run the missing cells of one group, without `prepare`, beside runners of other groups in the same folder.

    Raises ConfigurationError: another runner works on this group.
    """
    lock = _lock(folder / LOCKS / group.key)
    try:
        return _runner(experiment, folder, [group], settings).run()
    finally:
        lock.release()


def run_experiment(experiment: Experiment, folder: Path, groups: Sequence[Group], **settings: Any) -> bool:
    """Prepare, then run the missing cells; returns whether all cells are done.

    Raises ConfigurationError: another runner works in the folder, or a command of prepare: failed.
    """
    lock = _lock(folder)
    try:
        runner = _runner(experiment, folder, groups, settings)
        for command in experiment.prepare:
            _prepare(command, folder, runner.report)
        return runner.run()
    finally:
        lock.release()


def _runner(experiment: Experiment, folder: Path, groups: Sequence[Group], settings: Mapping[str, Any]) -> Runner:
    """The folder must be locked: the experiment's file is copied there."""
    (folder / EXPERIMENT_FILE).write_text(experiment.text, encoding="utf-8")
    return Runner(folder, groups, experiment=experiment.text, **settings)


def read_scores(path: Path, score: ScoreSpec) -> dict[str, float]:
    """The task's metrics, from the score's file. Raises ConfigurationError: no file, or it lacks a number."""
    try:
        content = read_json(path)
    except ConfigurationError as error:
        raise ConfigurationError(f"the score's file: {error}") from error
    return {
        name: metric.scale * mean(_number_at(content, keys, path) for keys in metric.paths)
        for name, metric in score.metrics.items()
    }


def _number_at(content: Any, keys: str, path: Path) -> float:
    found = content
    for key in keys.split("/"):
        if not isinstance(found, Mapping) or key not in found:
            there = ", ".join(found) if isinstance(found, Mapping) else repr(found)
            raise ConfigurationError(f"{path} has no {keys}: instead of {key} there is {there}.")
        found = found[key]
    if isinstance(found, bool) or not isinstance(found, int | float):
        raise ConfigurationError(f"{path}: {keys} is {found!r}, not a number.")
    return float(found)


def _lock(folder: Path) -> FolderLock:
    try:
        return FolderLock(folder, grace_seconds=1)
    except ConfigurationError as error:
        raise ConfigurationError(
            f"another runner works in {folder}: wait until it ends, or give --output another folder."
        ) from error


def _prepare(command: Sequence[str], folder: Path, report: Report) -> None:
    words = [*process.launcher(1), *command[1:]] if command[0] == "python" else list(command)
    report(f"prepare: {' '.join(command)}")
    running = process.start(words, folder / "prepare.log")
    if running.process.wait() != 0:
        raise ConfigurationError(f"prepare: {' '.join(command)} failed: {running.last_words()}")


def _remove_all_but_metrics(folder: Path) -> None:
    for path in folder.glob("iter_*"):
        shutil.rmtree(path, ignore_errors=True)
    (folder / process.TRACKER).unlink(missing_ok=True)


def _how_it_ended(code: int) -> str:
    return f"ended by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _shown(value: float | None) -> str:
    return "none" if value is None else f"{value:.4g}"


REFRESH_SECONDS = 1.0


class Board:
    """Shows the runner's progress: a live table on a terminal, else a line for each event. A context manager."""

    def __init__(self, folder: Path, groups: Sequence[Group], console: Console | None = None) -> None:
        self.folder, self.groups = folder, groups
        self.console = console or Console(highlight=False)
        self._live = Live(console=self.console, auto_refresh=False) if self.console.is_terminal else None
        self._shown_at = 0.0

    def __enter__(self) -> "Board":
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def report(self, text: str) -> None:
        """One event."""
        self.console.print(Text(text))

    def refresh(self, runner: Runner) -> None:
        """Draw the table again, at most once a second."""
        now = max((running.seconds for _, running in runner.running.values()), default=0.0)
        if self._live is None or (runner.running and abs(now - self._shown_at) < REFRESH_SECONDS):
            return
        self._shown_at = now
        self._live.update(Stack(table(self.folder, self.groups), *_running_lines(runner)), refresh=True)


def table(folder: Path, groups: Sequence[Group]) -> Table:
    """The state of each group: how many cells are done, the chosen settings, the means of the results."""
    shown = Table("model", "task", "method", "tuned", "chosen", "seeds", "validation loss", "scores")
    for group in groups:
        now = progress(folder, group)
        shown.add_row(*group.name, *_cells_of(group, now), style="green" if now.is_done else "")
    return shown


def _cells_of(group: Group, now: CellProgress) -> tuple[str, ...]:
    tuned = sum(record is not None and record.is_trained for record in now.tuning)
    trained = [record for record in now.finals if record is not None and record.is_trained]
    failed = sum(record is not None and not record.is_trained for record in (*now.tuning, *now.finals))
    chosen = "" if now.best is None else list(losses_of_grid(group, now.tuning))[now.best] or "(no grid)"
    return (
        f"{tuned}/{len(now.tuning)}" + (f" ({failed} failed)" if failed else ""),
        chosen,
        f"{len(trained)}/{len(group.finals[0])}" + (f", {now.num_scored} scored" if now.is_scored else ""),
        _mean([record.validation_loss for record in trained]),
        _scores(group, trained),
    )


def _scores(group: Group, trained: Sequence[CellRecord]) -> str:
    names = group.task.score.metrics if group.task.score else ()
    means = {name: _mean([record.scores.get(name) for record in trained]) for name in names}
    return ", ".join(f"{name} {mean}" for name, mean in means.items() if mean)


def _mean(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{sum(known) / len(known):.4g}" if known else ""


def _running_lines(runner: Runner) -> list[Text]:
    return [
        Text(f"{todo.kind} {key}: {_how_far(runner.folder, todo.cell) or ''} {running.seconds:.0f} s")
        for key, (todo, running) in runner.running.items()
    ]


def _how_far(folder: Path, cell: process.Cell) -> str:
    path = process.checkpoints_folder(folder, cell) / METRICS_FILE
    records = read_metrics(path) if path.exists() else []
    return f"iteration {records[-1]['iteration']}," if records else ""
