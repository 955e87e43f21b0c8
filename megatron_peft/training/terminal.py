"""What a run shows while it trains: a live bar with ETA at a terminal, one plain line a log interval in a file."""

import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

# (field of the record, how it reads); a field that the record lacks is left out
LINE_FIELDS: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("consumed_samples", "consumed samples", lambda n: f"{n:12d}"),
    ("step_seconds", "elapsed time per iteration (ms)", lambda s: f"{1000 * s:.1f}"),
    ("learning_rate", "learning rate", lambda x: f"{x:.6E}"),
    ("loss", "loss", lambda x: f"{x:.6E}"),
    ("grad_norm", "grad norm", lambda x: f"{x:.3f}"),
    ("tokens_per_second", "tokens per second", lambda x: f"{x:.1f}"),
    ("validation_loss", "validation loss", lambda x: f"{x:.6E}"),
)
BAR_FIELDS: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("loss", "loss", lambda x: f"{x:.3f}"),
    ("validation_loss", "valid", lambda x: f"{x:.3f}"),
    ("grad_norm", "norm", lambda x: f"{x:.2f}"),
    ("tokens_per_second", "tok/s", lambda x: f"{x:.0f}"),
)


class Progress:
    """Reports the iterations from `start_iteration` to `total_iterations`; a context manager.

    Args:
        enabled: whether this rank reports. All methods do nothing where it is False.
        console: where to; by default standard output.
    """

    def __init__(
        self, total_iterations: int, start_iteration: int = 0, enabled: bool = True, console: Console | None = None
    ) -> None:
        self._total, self._start = total_iterations, start_iteration
        self._enabled = enabled
        self._console = console or Console()
        self._bar: Bar | None = None
        self._started_at = time.monotonic()
        self._shown: dict[str, Any] = {}

    def __enter__(self) -> "Progress":
        self._started_at = time.monotonic()
        if self._enabled and self._console.is_terminal:
            self._bar = _make_bar(self._console)
            self._task = self._bar.add_task("training", total=self._total, completed=self._start, status="")
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def advance(self, iteration: int) -> None:
        """`iteration` iterations are done: moves the bar, prints nothing."""
        if self._bar is not None:
            self._bar.update(self._task, completed=iteration)

    def update(self, record: Mapping[str, Any]) -> None:
        """A log interval ended; `record` is the line of metrics."""
        if self._bar is not None:
            self._shown.update(record)  # the last validation loss stays in sight
            self._bar.update(
                self._task, completed=record["iteration"], status=" ".join(_readings(self._shown, BAR_FIELDS, " "))
            )
        elif self._enabled:
            self._print(self._line(record))

    def message(self, text: str) -> None:
        """Print `text` on a line of its own (above the bar)."""
        if self._enabled:
            self._print(text)

    def _line(self, record: Mapping[str, Any]) -> str:
        iteration = record["iteration"]
        parts = [f"iteration {iteration:8d}/{self._total:8d}", *_readings(record, LINE_FIELDS, ": ")]
        return " | ".join([*parts, f"ETA: {self._time_left(iteration)}"])

    def _time_left(self, iteration: int) -> timedelta:
        """From the mean pace of this process so far, evaluations and saves included."""
        done = max(iteration - self._start, 1)
        seconds = (time.monotonic() - self._started_at) / done * (self._total - iteration)
        return timedelta(seconds=round(seconds))

    def _print(self, text: str) -> None:
        self._console.print(text, soft_wrap=True, markup=False, highlight=False)
        self._console.file.flush()  # a log file is read while the run goes on


def _make_bar(console: Console) -> Bar:
    return Bar(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[status]}"),
        console=console,
    )


def _readings(
    record: Mapping[str, Any], fields: tuple[tuple[str, str, Callable[[Any], str]], ...], separator: str
) -> list[str]:
    return [f"{label}{separator}{show(record[name])}" for name, label, show in fields if record.get(name) is not None]
