"""The live table of an experiment: a line for each model, task and method, and what is running now."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.console import Group as Stack
from rich.live import Live
from rich.table import Table
from rich.text import Text

from megatron_peft.experiment import process
from megatron_peft.experiment.cells import Group
from megatron_peft.experiment.plan import Progress, losses_of_grid, progress
from megatron_peft.experiment.record import CellRecord
from megatron_peft.experiment.runner import Runner
from megatron_peft.training.metrics import METRICS_FILE, read_metrics

REFRESH_SECONDS = 1.0


class Board:
    """Shows the runner's progress: live on a terminal, else a line for each event. A context manager."""

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
        """Draw again; the files are read once a second at most."""
        now = max((running.seconds for _, running in runner.running.values()), default=0.0)
        if self._live is None or (runner.running and abs(now - self._shown_at) < REFRESH_SECONDS):
            return
        self._shown_at = now
        self._live.update(Stack(table(self.folder, self.groups), *_running_lines(runner)), refresh=True)


def table(folder: Path, groups: Sequence[Group]) -> Table:
    """Where each group is: cells done of those there are, the settings chosen, the means of what was measured."""
    shown = Table("model", "task", "method", "tuned", "chosen", "seeds", "validation loss", "scores")
    for group in groups:
        now = progress(folder, group)
        shown.add_row(*group.name, *_cells_of(group, now), style="green" if now.is_done else "")
    return shown


def _cells_of(group: Group, now: Progress) -> tuple[str, ...]:
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
    path = process.checkpoints(folder, cell) / METRICS_FILE
    records = read_metrics(path) if path.exists() else []
    return f"iteration {records[-1]['iteration']}," if records else ""
