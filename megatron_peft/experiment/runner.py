"""Runs the missing cells, a few at a time, writes a record of each, and shows how far they are.

The runner has no state of its own: `results.work` derives the next cell from the records. A cell that fails is
reported, recorded and tried again by the next call.
"""

import json
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from math import isfinite
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from rich.console import Console
from rich.console import Group as Stack
from rich.live import Live
from rich.table import Table
from rich.text import Text

from megatron_peft.checkpoint.folders import TRACKER, FolderLock, write_atomically
from megatron_peft.config import ConfigurationError
from megatron_peft.config.untrusted import read_json
from megatron_peft.experiment import cell_record, process
from megatron_peft.experiment.cell_record import CellRecord
from megatron_peft.experiment.cells import Cell, Group
from megatron_peft.experiment.contrasts import contrast_digests
from megatron_peft.experiment.results import Work, progress, work
from megatron_peft.experiment.spec import EXPERIMENT_FILE, TEST_LOSS, VALIDATION_LOSS, Experiment, ScoreSpec
from megatron_peft.training.metrics import ITEMS_FILE, METRICS_FILE, read_metrics

POLL_SECONDS = 0.2


class CellJob(NamedTuple):
    """A cell at work, and its record with the source of its numbers from before the start: commit and data may change
    until it ends.
    """

    work: Work
    running: process.Running
    record: CellRecord


@dataclass
class Runner:
    """A call of the runner on a folder.

    jobs: cells at a time; report: called with a sentence at each event; console: a terminal shows a live table.
    program: the training program, as words after `python`; None is `megatron-peft train`.
    experiment: the text of the experiment's file; contrasts: the digests of what it asks.
    gave_up: keys of the cells that failed in this call; running: what runs now, by the cell's key; states: the table
    of the groups since the last event.
    """

    folder: Path
    groups: Sequence[Group]
    jobs: int = 1
    report: Callable[[str], None] = print
    console: Console | None = None
    program: Sequence[str] | None = None
    keep_checkpoints: bool = False
    experiment: str = ""
    contrasts: Mapping[str, str] = field(default_factory=dict)
    gave_up: set[str] = field(default_factory=set)
    running: dict[str, CellJob] = field(default_factory=dict)
    states: Table = field(default_factory=Table)

    def run(self) -> bool:
        """Run all that is missing; returns whether all cells are done.

        Raises KeyboardInterrupt on SIGINT and SIGTERM, after its cells have ended.
        """
        signals: list[int] = []
        with ExitStack() as stack:
            for number in (signal.SIGINT, signal.SIGTERM):
                stack.callback(signal.signal, number, signal.signal(number, lambda number, _: signals.append(number)))
            if self.console and self.console.is_terminal:
                live = Live(console=self.console, refresh_per_second=1, transient=True, get_renderable=self.shown)
                stack.enter_context(live)
            self._start_what_fits()
            while self.running and not signals:
                time.sleep(POLL_SECONDS)
                ended = [job for job in self.running.values() if job.running.has_ended()]
                for job in ended:
                    del self.running[job.work.cell.key]
                    if not signals:
                        self._finish(job)
                if ended and not signals:
                    self._start_what_fits()
            self._end_cells()
        if signals:
            raise KeyboardInterrupt
        return not [group for group in self.groups if not self._is_done(group)]

    def shown(self) -> Stack:
        """The table of the groups, and what runs now."""
        lines = []
        for key, job in list(self.running.items()):
            records = []
            with suppress(OSError, ConfigurationError):  # its folder may be removed meanwhile
                records = read_metrics(process.checkpoints_folder(self.folder, job.work.cell) / METRICS_FILE)
            iteration = f"iteration {records[-1]['iteration']}," if records else ""
            lines.append(Text(f"{job.work.kind} {key}: {iteration} {job.running.seconds:.0f} s"))
        return Stack(self.states, *lines)

    def _start_what_fits(self) -> None:
        """Start cells until `jobs` run. This reads all records, so it is not done at every look at the processes."""
        for todo in (todo for group in self.groups for todo in work(self.folder, group, self.gave_up)):
            if len(self.running) >= self.jobs:
                break
            if todo.cell.key not in self.running:
                self._start(todo)
        self.states = table(self.folder, self.groups)

    def _start(self, todo: Work) -> None:
        cell, folder = todo.cell, process.run_folder(self.folder, todo.cell)
        source = cell_record.source_of(self.experiment, cell, todo.score)
        if todo.score is None:
            flags = json.dumps(cell.flags)
            if not process.began_with(folder, flags):  # what other flags have left is not gone on with
                shutil.rmtree(folder, ignore_errors=True)
            command = process.training_command(self.folder, cell, self.program or process.PROGRAM)
            if "--load" not in command:
                shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(folder / process.FLAGS, flags)
            source |= {"contrasts": self.contrasts} if self.contrasts else {}
            record = cell_record.of_cell(cell, "failed", provenance={"training": source})
        else:
            process.score_file(self.folder, cell).unlink(missing_ok=True)
            command = process.score_command(self.folder, cell, todo.score)
            trained = cell_record.read_cell_record(self.folder, cell)
            assert trained is not None
            record = replace(trained, provenance={**trained.provenance, "score": source})
        self.report(f"{todo.kind} {cell.key}")
        try:
            self.running[cell.key] = CellJob(todo, process.start(command, folder / process.LOG), record)
        except ConfigurationError as error:
            self.gave_up.add(cell.key)
            self.report(f"FAILED: {todo.kind} {cell.key}: {error}")
            self._write_failure(todo, replace(record, reason=str(error)))

    def _finish(self, job: CellJob) -> None:
        cell, running = job.work.cell, job.running
        try:
            if (code := running.process.returncode) != 0:
                ended = f"ended by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
                raise ConfigurationError(f"{ended}: {running.last_words()}")
            if (score := job.work.score) is None:
                record = self._trained(job)
                done, numbers = "trained", {"validation loss": record.validation_loss}
            else:
                numbers, items = read_scores(process.score_file(self.folder, cell), score)
                spent: dict[str, Any] = {"score_command": score.command, "score_seconds": running.seconds}
                spent |= {"items": {**job.record.items, **items}}
                done, record = "scored", replace(job.record, scores=numbers, **spent)
        except ConfigurationError as error:
            # A rate that was too high is a result of the tuning, not a failure.
            group, status = self._group_of(cell), "failed"
            is_tuning = group.method.num_points > 1 and cell in progress(self.folder, group).untried
            if is_tuning and cell_record.NOT_FINITE in running.words():
                status = "diverged"
            else:
                self.gave_up.add(cell.key)
            outcome = status if status == "diverged" else status.upper()
            self.report(f"{outcome}: {job.work.kind} {cell.key}: {error}\n  all of it: {running.log}")
            values = {"started_at": running.started_at, "seconds": running.seconds, "reason": str(error)}
            self._write_failure(job.work, replace(job.record, status=status, **values))
            return
        cell_record.write_record(self.folder, cell, record)
        self._remove_checkpoints(cell)
        shown = ", ".join(f"{name} {'none' if value is None else f'{value:.4g}'}" for name, value in numbers.items())
        self.report(f"{done} {cell.key} in {running.seconds:.0f} s: {shown}")

    def _write_failure(self, todo: Work, record: CellRecord) -> None:
        """Write the record of a training that failed, unless the cell was trained before: it may be trained again for
        its score.
        """
        before = cell_record.read_cell_record(self.folder, todo.cell)
        if todo.kind == "train" and not (before and before.is_trained):
            cell_record.write_record(self.folder, todo.cell, record)

    def _trained(self, job: CellJob) -> CellRecord:
        if stopped := cell_record.STOPPED.search(job.running.words()):
            raise ConfigurationError(f"{stopped[0]}: the next call goes on from its checkpoint")
        save = process.checkpoints_folder(self.folder, job.work.cell)
        records, lambdas = (read_metrics(save / name) for name in (METRICS_FILE, process.LAMBDA_FILE))
        items = {
            loss: cell_record.from_items(read_metrics(save / ITEMS_FILE.format(data)))
            for data, loss in (("validation", VALIDATION_LOSS), ("test", TEST_LOSS))
        }
        if not records:
            raise ConfigurationError(f"it ended well, but left no {save / METRICS_FILE}")
        log, is_whole = job.running.log.read_text(errors="replace"), "--load" not in job.running.heading.split()
        return replace(
            job.record,
            status="trained",
            started_at=job.running.started_at,
            seconds=job.running.seconds if is_whole else None,
            cpu_seconds=job.running.cpu_seconds if is_whole else None,
            trainable_parameters=cell_record.trainable_parameters(log),
            test_loss=cell_record.test_loss(log),
            items={loss: pairs for loss, pairs in items.items() if pairs},
            lambdas=cell_record.by_layer(lambdas, "lambda"),
            grad_norms=cell_record.by_layer(records, "grad_norm_by_layer"),
            **cell_record.from_metrics(records),
        )

    def _group_of(self, cell: Cell) -> Group:
        return next(group for group in self.groups if group.name == (cell.model, cell.task, cell.method))

    def _remove_checkpoints(self, cell: Cell) -> None:
        """Remove those of the finished cells of the group, once its grid is complete."""
        now = progress(self.folder, self._group_of(cell))
        if self.keep_checkpoints or now.untried:
            return
        group, missing = now.group, list(work(self.folder, now.group))
        for key in group.cells.keys() - {todo.cell.key for todo in missing} - self.running.keys():
            checkpoints = process.checkpoints_folder(self.folder, group.cells[key])
            for path in checkpoints.glob("iter_*"):
                shutil.rmtree(path, ignore_errors=True)
            (checkpoints / TRACKER).unlink(missing_ok=True)

    def _end_cells(self) -> None:
        for job in self.running.values():
            job.running.process.terminate()  # a training run saves and ends
        for key, job in self.running.items():
            try:
                job.running.process.wait(process.PATIENCE_SECONDS)
            except subprocess.TimeoutExpired:
                job.running.process.kill()
            self.report(f"stopped {key}")
        self.running.clear()

    def _is_done(self, group: Group) -> bool:
        """Whether nothing failed; reports a grid without a finite validation loss, and a rate that is not tuned."""
        now = progress(self.folder, group, self.gave_up)
        tuning = {cell.key for cell in now.group.tuning}
        if now.best is None and not tuning & self.gave_up:
            self.report(f"FAILED: {group.key}: no point of its grid ended with a finite validation loss")
            return False
        if now.chosen and now.why_not_tuned:
            self.report(f"NOT TUNED: {group.key}: {now.chosen[0].point}, since {now.why_not_tuned}")
        return not self.gave_up & now.group.cells.keys()


def run_experiment(
    experiment: Experiment, folder: Path, groups: Sequence[Group], is_whole: bool = True, **settings: Any
) -> bool:
    """Prepare, then run the missing cells; returns whether all cells are done.

    Args: is_whole: False runs one group, without `prepare`, beside runners of other groups; settings: of the `Runner`.

    Raises ConfigurationError: another runner works on the same cells, or a command of prepare: failed.
    """
    of_groups = [folder / "locks" / group.key for group in groups]
    with ExitStack() as locks:
        for locked in (folder, *of_groups) if is_whole else of_groups:
            try:
                locks.callback(FolderLock(locked, grace_seconds=1).release)
            except ConfigurationError as error:
                raise ConfigurationError(
                    f"another runner works in {locked}: wait until it ends, or give --output another folder."
                ) from error
        (folder / EXPERIMENT_FILE).write_text(experiment.text, encoding="utf-8")
        digests = contrast_digests(experiment)
        runner = Runner(folder, groups, experiment=experiment.text, contrasts=digests, **settings)
        for command in experiment.prepare if is_whole else ():
            words = process.command_of(command, process.launcher(1))
            runner.report(f"prepare: {shlex.join(command)}")
            running = process.start(words, folder / "prepare.log")
            if running.process.wait() != 0:
                raise ConfigurationError(f"prepare: {shlex.join(command)} failed: {running.last_words()}")
        return runner.run()


def read_scores(path: Path, score: ScoreSpec) -> tuple[dict[str, float], dict[str, list[tuple[float, int]]]]:
    """The task's metrics from the score's file, and (number, 1) of each test item of those whose one path is a list.

    Raises ConfigurationError: no file, or it lacks a number.
    """
    content, scores, items = read_json(path), {}, {}
    for name, metric in score.metrics.items():
        of_paths = [[metric.scale * number for number in _numbers_at(content, keys, path)] for keys in metric.paths]
        scores[name] = mean(map(mean, of_paths))
        if len(of_paths) == 1 and len(of_paths[0]) > 1 and isfinite(scores[name]):
            items[name] = [(round(number, 6), 1) for number in of_paths[0]]
    return scores, items


def _numbers_at(content: Any, keys: str, path: Path) -> list[float]:
    """The number at these keys, or the list of such."""
    value = content
    for key in keys.split("/"):
        if not isinstance(value, Mapping) or key not in value:
            there = ", ".join(value) if isinstance(value, Mapping) else repr(value)
            raise ConfigurationError(f"{path} has no {keys}: instead of {key} there is {there}.")
        value = value[key]
    numbers = value if isinstance(value, list) else [value]
    if not numbers or not all(type(number) in (int, float) for number in numbers):
        raise ConfigurationError(f"{path}: {keys} is {value!r}, not a number.")
    return [float(number) for number in numbers]


def table(folder: Path, groups: Sequence[Group]) -> Table:
    """The state of each group: how many cells are done, the chosen settings, the means of the results."""

    def average(values: Sequence[float | None]) -> str:
        known = [value for value in values if value is not None]
        return f"{mean(known):.4g}" if known else ""

    shown = Table("model", "task", "method", "tuned", "chosen", "seeds", "validation loss", "scores")
    for group in groups:
        now, score = progress(folder, group, None), group.task.score
        cells = [cell.key for cell in (*now.group.tuning, *now.chosen)]
        failed = sum(not now.records[key].is_trained for key in cells if key in now.records)
        tuned = sum(record is not None and record.is_trained for _, record in now.tuning)
        trained = now.finals.values()
        scores = {name: average([run.scores.get(name) for run in trained]) for name in (score.metrics if score else ())}
        shown.add_row(
            *group.name,
            f"{tuned}/{len(now.tuning)}" + (f" ({failed} failed)" if failed else ""),
            now.chosen_point,
            f"{len(trained)}/{len(group.seeds)}" + (f", {now.num_scored} scored" if score else ""),
            average([record.validation_loss for record in trained]),
            ", ".join(f"{name} {value}" for name, value in scores.items() if value),
            style="green" if now.is_done else "",
        )
    return shown
