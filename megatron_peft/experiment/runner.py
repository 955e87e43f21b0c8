"""Run the missing cells of an experiment, a few at a time, write a record of each, and show how far they are.

`results.work` derives the next cell from the records, so a new runner continues where another one stopped. A cell that
fails is reported, recorded and tried again by the next call.
"""

import json
import os
import shlex
import shutil
import signal
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
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
from megatron_peft.experiment import process, records
from megatron_peft.experiment.cells import Cell, Group
from megatron_peft.experiment.records import CellRecord, read_records, write_record
from megatron_peft.experiment.results import Records, Work, progress, work
from megatron_peft.experiment.spec import EXPERIMENT_FILE, TEST_LOSS, VALIDATION_LOSS, Experiment, ScoreSpec
from megatron_peft.training.metrics import ITEMS_FILE, METRICS_FILE, read_metrics

POLL_S = 0.5  # between two looks for a signal
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Job(NamedTuple):
    """A cell at work, and its record as of the start: commit and data may change until it ends."""

    work: Work
    running: process.Running
    record: CellRecord


@dataclass
class Runner:
    """A call of the runner on a directory.

    jobs: cells at a time; report: called with a sentence at each event; console: a terminal shows a live table.
    program: the training program, as words after `python`; None is `megatron-peft train`.
    recorded: what the directory says; gave_up: keys of the cells that failed in this call; running: by the cell's key.
    """

    experiment: Experiment
    folder: Path
    groups: Sequence[Group]
    jobs: int = 1
    report: Callable[[str], None] = print
    console: Console | None = None
    program: Sequence[str] | None = None
    keep_checkpoints: bool = False
    recorded: dict[str, CellRecord] = field(default_factory=dict)
    gave_up: set[str] = field(default_factory=set)
    running: dict[str, Job] = field(default_factory=dict)

    def run(self) -> bool:
        """Run all that is missing; returns whether all cells are done.

        Raises KeyboardInterrupt on SIGINT, SIGTERM and SIGHUP, after its cells have ended.
        """
        received: list[int] = []
        self.recorded = read_records(self.folder)
        with ThreadPoolExecutor(self.jobs) as pool, ExitStack() as stack:
            for number in SIGNALS:
                stack.callback(signal.signal, number, signal.signal(number, lambda number, _: received.append(number)))
            if self.console and self.console.is_terminal:
                live = Live(console=self.console, refresh_per_second=1, transient=True, get_renderable=self.show)
                stack.enter_context(live)
            stack.callback(self._stop)
            self._start_missing(pool)
            while self.running and not received:
                wait([job.running.ended for job in self.running.values()], POLL_S, FIRST_COMPLETED)
                ended = [key for key, job in self.running.items() if job.running.ended.done()]
                for key in ended if not received else ():
                    self._finish(self.running.pop(key))
                if ended and not received:
                    self._start_missing(pool)
        if received:
            raise KeyboardInterrupt
        return all([self._is_done(group) for group in self.groups])

    def show(self) -> Stack:
        """Return the table of the groups, and what runs now."""
        lines = []
        for key, job in list(self.running.items()):
            metrics = []
            with suppress(OSError, ConfigurationError):  # its directory may be removed meanwhile
                metrics = read_metrics(process.checkpoints_folder(self.folder, job.work.cell) / METRICS_FILE)
            iteration = f"iteration {metrics[-1]['iteration']}," if metrics else ""
            lines.append(Text(f"{job.work.kind} {key}: {iteration} {job.running.seconds:.0f} s"))
        return Stack(table(dict(self.recorded), self.groups), *lines)

    def _start_missing(self, pool: ThreadPoolExecutor) -> None:
        for todo in (one for group in self.groups for one in work(self.folder, self.recorded, group, self.gave_up)):
            if len(self.running) >= self.jobs:
                return
            if todo.cell.key not in self.running:
                self._start(todo, pool)

    def _start(self, todo: Work, pool: ThreadPoolExecutor) -> None:
        cell, folder = todo.cell, process.run_folder(self.folder, todo.cell)
        if todo.score is None:
            flags, written = json.dumps(cell.flags), folder / process.FLAGS
            if not written.is_file() or written.read_text(encoding="utf-8") != flags:  # other flags are not continued
                shutil.rmtree(folder, ignore_errors=True)
            command = process.training_command(self.folder, cell, self.program or process.PROGRAM)
            if "--load" not in command:
                shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(written, flags)
            sources = {"data": records.data_digests(cell.flags), "contrasts": self.experiment.asked}
            record = records.of_cell(cell, **sources)
        else:
            process.score_file(self.folder, cell).unlink(missing_ok=True)
            command = process.score_command(self.folder, cell, todo.score)
            record = self.recorded[cell.key]
            data = {**record.data, **records.data_digests(todo.score.command)}
            record = replace(record, data=data, score=records.as_json(todo.score))
        self.report(f"{todo.kind} {cell.key}")
        try:
            self.running[cell.key] = Job(todo, process.start(command, folder / process.LOG, pool), record)
        except ConfigurationError as error:
            self.gave_up.add(cell.key)
            self.report(f"FAILED: {todo.kind} {cell.key}: {error}")
            self._write_failure(todo, replace(record, reason=str(error)))

    def _finish(self, job: Job) -> None:
        cell, running = job.work.cell, job.running
        try:
            if (code := running.wait()) != 0:
                ended = f"ended by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
                raise ConfigurationError(f"{ended}: {running.output_end()}")
            if (score := job.work.score) is None:
                record = self._trained(job)
                done, numbers = "trained", {"validation loss": record.validation_loss}
            else:
                numbers, items = read_scores(process.score_file(self.folder, cell), score)
                items = {**job.record.items, **items}
                record = replace(job.record, scores=numbers, score_seconds=running.seconds, items=items)
                done = "scored"
        except ConfigurationError as error:
            # A rate that was too high is a result of the tuning, not a failure.
            group, status = self._group_of(cell), "failed"
            is_tuning = group.method.num_points > 1 and cell in progress(self.recorded, group).untried
            if is_tuning and records.NOT_FINITE in running.output():
                status = "diverged"
            else:
                self.gave_up.add(cell.key)
            outcome = status if status == "diverged" else status.upper()
            self.report(f"{outcome}: {job.work.kind} {cell.key}: {error}\n  all of it: {running.log}")
            values = {"started_at": running.started_at, "seconds": running.seconds, "reason": str(error)}
            self._write_failure(job.work, replace(job.record, status=status, **values))
            return
        self._write(record)
        self._remove_checkpoints(cell)
        shown = ", ".join(f"{name} {'none' if value is None else f'{value:.4g}'}" for name, value in numbers.items())
        self.report(f"{done} {cell.key} in {running.seconds:.0f} s: {shown}")

    def _write(self, record: CellRecord) -> None:
        write_record(self.folder, record)
        self.recorded[record.key] = record

    def _write_failure(self, todo: Work, record: CellRecord) -> None:
        """Write the record of a training that failed, unless the cell was trained before: it may be trained again for
        its score.
        """
        before = progress(self.recorded, self._group_of(todo.cell)).records.get(todo.cell.key)
        if todo.kind == "train" and not (before and before.is_trained):
            self._write(record)

    def _trained(self, job: Job) -> CellRecord:
        running, log = job.running, job.running.output()
        if stopped := records.STOPPED.search(log):
            raise ConfigurationError(f"{stopped[0]}: the next call goes on from its checkpoint")
        save = process.checkpoints_folder(self.folder, job.work.cell)
        metrics, lambdas = (read_metrics(save / name) for name in (METRICS_FILE, process.LAMBDA_FILE))
        if not metrics:
            raise ConfigurationError(f"it ended well, but left no {save / METRICS_FILE}")
        items = {
            loss: records.from_items(read_metrics(save / ITEMS_FILE.format(data)))
            for data, loss in (("validation", VALIDATION_LOSS), ("test", TEST_LOSS))
        }
        is_whole = "--load" not in running.heading.split()
        return replace(
            job.record,
            status="trained",
            started_at=running.started_at,
            seconds=running.seconds if is_whole else None,
            cpu_seconds=running.cpu_seconds if is_whole else None,
            items={loss: pairs for loss, pairs in items.items() if pairs},
            lambdas=records.by_layer(lambdas, "lambda"),
            grad_norms=records.by_layer(metrics, "grad_norm_by_layer"),
            **records.from_metrics(metrics),
            **records.from_log(running.log.read_text(errors="replace")),
        )

    def _group_of(self, cell: Cell) -> Group:
        return next(group for group in self.groups if group.name == (cell.model, cell.task, cell.method))

    def _remove_checkpoints(self, cell: Cell) -> None:
        """Remove those of the finished cells of the group, once its grid is complete."""
        now = progress(self.recorded, self._group_of(cell))
        if self.keep_checkpoints or now.untried:
            return
        missing = {todo.cell.key for todo in work(self.folder, self.recorded, now.group)}
        for key in now.group.cells.keys() - missing - self.running.keys():
            checkpoints = process.checkpoints_folder(self.folder, now.group.cells[key])
            for path in checkpoints.glob("iter_*"):
                shutil.rmtree(path, ignore_errors=True)
            (checkpoints / TRACKER).unlink(missing_ok=True)

    def _stop(self) -> None:
        """End what runs: a training run saves first."""
        futures = {key: job.running.ended for key, job in self.running.items()}
        for number, timeout in ((signal.SIGTERM, process.TIMEOUT_S), (signal.SIGKILL, None)):
            for key in (key for key, future in futures.items() if not future.done()):
                with suppress(ProcessLookupError):
                    os.kill(self.running[key].running.process.pid, number)
            wait(futures.values(), timeout)
        for key, job in self.running.items():
            job.running.wait()
            self.report(f"stopped {key}")
        self.running.clear()

    def _is_done(self, group: Group) -> bool:
        """Return True if nothing failed; report a grid without a finite validation loss, and a rate not tuned."""
        now = progress(self.recorded, group, self.gave_up)
        if now.best is None and not {cell.key for cell in now.group.tuning} & self.gave_up:
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
        runner = Runner(experiment, folder, groups, **settings)
        for command in experiment.prepare if is_whole else ():
            runner.report(f"prepare: {shlex.join(command)}")
            with ThreadPoolExecutor(1) as pool:
                words = process.command_of(command, process.launcher(1))
                running = process.start(words, folder / "prepare.log", pool)
                try:
                    code = running.wait()
                except BaseException:  # Ctrl-C
                    os.kill(running.process.pid, signal.SIGKILL)
                    raise
                if code != 0:
                    raise ConfigurationError(f"prepare: {shlex.join(command)} failed: {running.output_end()}")
        return runner.run()


def read_scores(path: Path, score: ScoreSpec) -> tuple[dict[str, float], dict[str, list[tuple[float, int]]]]:
    """Return the task's metrics from the score's file, and (number, 1) of each test item of those with a list.

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
    """Return the number at these keys, or the list of such."""
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


def table(records: Records, groups: Sequence[Group]) -> Table:
    """Return the state of each group: how many cells are done, the chosen settings, the means of the results."""

    def average(values: Sequence[float | None]) -> str:
        known = [value for value in values if value is not None]
        return f"{mean(known):.4g}" if known else ""

    shown = Table("model", "task", "method", "tuned", "chosen", "seeds", "validation loss", "scores")
    for group in groups:
        now, score = progress(records, group, None), group.task.score
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
