"""How far a long list of requests has come: a bar at a terminal, a line at each tenth elsewhere (logs of clusters)."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


@contextmanager
def request_bar(title: str, total: int, done: int = 0) -> Iterator[Callable[[int], None]]:
    """Shows, on stderr, how many of `total` requests are answered; what it yields is told of each number more."""
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=total, completed=done)
        lines = _Lines(title, total, done)

        def advance(number: int) -> None:
            bar.advance(task, number)
            if not console.is_terminal:
                lines.advance(number)

        yield advance


class _Lines:
    """Says a line whenever a further tenth is done."""

    def __init__(self, title: str, total: int, done: int) -> None:
        self._title, self._total, self._done = title, total, done

    def advance(self, number: int) -> None:
        before, self._done = self._done, self._done + number
        if before * 10 // self._total < self._done * 10 // self._total:
            print(f"{self._title}: {self._done} of {self._total}", file=sys.stderr, flush=True)
