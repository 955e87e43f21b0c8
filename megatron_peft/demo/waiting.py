"""A sign of life while something takes long, without torch: it is shown while that is imported, too."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

PROGRAM = "megatron-peft demo"
SECONDS_OF_SILENCE = 3.0  # at most, in a file


@contextmanager
def waiting(text: str, enabled: bool = True, total: int | None = None) -> Iterator[Callable[[int], None]]:
    """Tell `text`, and that it goes on: at a terminal a bar that moves, in a file a line every three seconds.

    Yields a function to call with how many of `total` have just been done. `enabled`: whether this process tells it.
    """
    console, done = Console(), 0

    def advance(number: int) -> None:
        nonlocal done
        done += number

    def tell() -> None:
        started_at = time.monotonic()
        while not is_over.wait(SECONDS_OF_SILENCE):
            of_all = f", {done} of {total}" if total else ""
            print(f"demo: {text}: {time.monotonic() - started_at:.0f} s{of_all}", flush=True)

    if not enabled:
        yield advance
    elif console.is_terminal:
        columns = TextColumn("demo: {task.description}"), BarColumn(), TimeElapsedColumn()
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task(text, total=total)
            yield lambda number: bar.advance(task, number)
    else:
        print(f"demo: {text}", flush=True)
        is_over = threading.Event()
        teller = threading.Thread(target=tell, daemon=True)
        teller.start()
        try:
            yield advance
        finally:
            is_over.set()
            teller.join()
