"""A figure: what was measured, the target, and whether it is reached; as a table and as JSON."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Figure:
    """One measured number.

    Args:
        name: what was measured.
        measured: in `unit`.
        target: the largest value that is good; None where the number is only for comparison.
        unit: "" for a ratio.
        note: the numbers behind it.
    """

    name: str
    measured: float
    target: float | None = None
    unit: str = ""
    note: str = ""

    @property
    def reached(self) -> bool | None:
        """Whether the target is reached; None without one."""
        return None if self.target is None else self.measured <= self.target


VERDICTS = {True: "[green]pass[/green]", False: "[red]FAIL[/red]", None: ""}


def print_table(title: str, figures: Sequence[Figure], console: Console | None = None) -> None:
    """The figures of one benchmark as a table."""
    table = Table(title=title, title_justify="left")
    for header in ("figure", "measured", "target", "", "what is behind it"):
        table.add_column(header, overflow="fold")
    for figure in figures:
        target = "" if figure.target is None else f"<= {_number(figure.target)} {figure.unit}"
        measured = f"{_number(figure.measured)} {figure.unit}"
        table.add_row(figure.name, measured, target, VERDICTS[figure.reached], figure.note)
    (console or Console()).print(table)


def write_json(path: Path, figures: Sequence[Figure]) -> None:
    """A list of objects: the fields of `Figure`, and `reached`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{**dataclasses.asdict(figure), "reached": figure.reached} for figure in figures]
    path.write_text(json.dumps(rows, indent=2) + "\n")


def _number(value: float) -> str:
    return f"{value:.4g}"
