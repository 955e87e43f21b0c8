"""A sign of life while something takes long, without torch: it is shown while that is imported, too."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

SECONDS_OF_SILENCE = 4.0  # at most, in a file


@contextmanager
def waiting(text: str, enabled: bool = True) -> Iterator[None]:
    """Tell `text`, and that it goes on: at a terminal a bar that moves, in a file a line every four seconds.

    Args:
        enabled: whether this process tells it.
    """
    console = Console()
    if not enabled:
        yield
    elif console.is_terminal:
        columns = TextColumn("demo: {task.description}"), BarColumn(), TimeElapsedColumn()
        with Progress(*columns, console=console, transient=True) as bar:
            bar.add_task(text, total=None)
            yield
    else:
        print(f"demo: {text}", flush=True)
        is_done = threading.Event()
        teller = threading.Thread(target=_tell, args=(text, is_done), daemon=True)
        teller.start()
        try:
            yield
        finally:
            is_done.set()
            teller.join()


def _tell(text: str, is_done: threading.Event) -> None:
    started_at = time.monotonic()
    while not is_done.wait(SECONDS_OF_SILENCE):
        print(f"demo: {text}: {time.monotonic() - started_at:.0f} s", flush=True)
