"""Progress of long work: a bar at a terminal, elsewhere a line now and then."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.filesize import decimal
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

SECONDS_BETWEEN_LINES = 10.0


class Advance(Protocol):
    def __call__(self, done: int, more: int = 0) -> None:
        """Count `done` as done, and add `more` to the total."""


def no_progress(done: int, more: int = 0) -> None:
    """Show nothing."""


@contextmanager
def progress_bar(
    title: str, total: int | None = None, *, done: int = 0, in_bytes: bool = False, enabled: bool = True
) -> Iterator[Advance]:
    """Show on stderr how much of `total` is done; where stderr is no terminal, a line every 10 seconds at most.

    Yield the function to call after each part. total: None where it is not known yet. done: of it, before the start.
    """
    console = Console(stderr=True)
    amount = (DownloadColumn(), TransferSpeedColumn()) if in_bytes else (MofNCompleteColumn(), TimeElapsedColumn())
    columns = TextColumn("{task.description}"), BarColumn(), *amount, TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True, disable=not (enabled and console.is_terminal)) as bar:
        task, line_at = bar.add_task(title, total=total, completed=done), time.monotonic()

        def advance(done: int, more: int = 0) -> None:
            nonlocal line_at
            now = bar.tasks[task]
            bar.update(task, advance=done, total=(now.total or 0) + more if more else None)
            if enabled and not console.is_terminal and time.monotonic() - line_at >= SECONDS_BETWEEN_LINES:
                show = decimal if in_bytes else str
                of_all = f" of {show(int(now.total))}" if now.total else ""
                console.print(f"{title}: {show(int(now.completed))}{of_all}", highlight=False)
                line_at = time.monotonic()

        yield advance
