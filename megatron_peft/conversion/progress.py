"""A bar over bytes at a terminal, and nothing elsewhere."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn


@contextmanager
def byte_bar(description: str, total_bytes: int, enabled: bool) -> Iterator[Callable[[int], None]]:
    """Shows a bar while inside; what it yields is told of each number of bytes done."""
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    shown = enabled and console.is_terminal
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True, disable=not shown) as bar:
        task = bar.add_task(description, total=total_bytes)
        yield lambda num_bytes: bar.advance(task, num_bytes)
