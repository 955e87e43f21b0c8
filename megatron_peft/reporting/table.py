"""A table of words, and how it is written as Markdown, CSV and LaTeX."""

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass

LATEX = {
    "\\": r"\textbackslash{}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "†": r"$^\dagger$",
    "–": "--",
    "≥": r"$\ge$",
}
BEST = "*"  # the first character of a cell that is to stand out; CSV leaves it away


@dataclass(frozen=True)
class Table:
    """Columns and rows of text.

    Attributes:
        title: above it; note: below it.
        text_columns: the first so many are words, aligned left; the others are numbers.
        is_sortable: whether a row means the same at any place.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    text_columns: int = 1
    is_sortable: bool = True

    def __post_init__(self) -> None:
        assert all(len(row) == len(self.columns) for row in self.rows), self.title

    def markdown(self) -> str:
        rule = ["---" if at < self.text_columns else "---:" for at in range(len(self.columns))]
        body = [[_markdown_cell(cell) for cell in row] for row in self.rows]
        lines = [f"| {' | '.join(row)} |" for row in (list(self.columns), rule, *body)]
        return "\n".join([f"**{self.title}**", "", *lines, *(["", self.note] if self.note else [])]) + "\n"

    def csv(self) -> str:
        output = io.StringIO()
        writer = csv.writer(output, lineterminator="\n")
        writer.writerows([self.columns, *([cell.removeprefix(BEST) for cell in row] for row in self.rows)])
        return output.getvalue()

    def latex(self) -> str:
        """A table environment that needs no package."""
        alignment = "l" * self.text_columns + "r" * (len(self.columns) - self.text_columns)
        rows = [" & ".join(_latex_cell(cell) for cell in row) + r" \\" for row in (self.columns, *self.rows)]
        body = [r"\hline", rows[0], r"\hline", *self._with_rules(rows[1:]), r"\hline"]
        caption = latex_text(f"{self.title}. {self.note}".strip())
        begin = [r"\begin{table}", r"\centering", f"\\caption{{{caption}}}", f"\\begin{{tabular}}{{{alignment}}}"]
        return "\n".join([*begin, *body, r"\end{tabular}", r"\end{table}"]) + "\n"

    def _with_rules(self, rows: Sequence[str]) -> list[str]:
        """A line above each group of rows, where the first column is only filled at a group's start."""
        grouped = any(not row[0] for row in self.rows)
        ruled = []
        for at, row in enumerate(rows):
            ruled += [r"\hline"] if grouped and at and self.rows[at][0] else []
            ruled.append(row)
        return ruled


def latex_text(text: str) -> str:
    return re.sub("|".join(map(re.escape, LATEX)), lambda found: LATEX[found.group()], text)


def _markdown_cell(cell: str) -> str:
    escaped = cell.removeprefix(BEST).replace("|", "\\|")
    return f"**{escaped}**" if cell.startswith(BEST) else escaped


def _latex_cell(cell: str) -> str:
    text = latex_text(cell.removeprefix(BEST))
    return f"\\textbf{{{text}}}" if cell.startswith(BEST) else text


def number(value: float | None, signed: bool = False) -> str:
    """Four significant digits or so: losses with three after the point, scores with one or two."""
    if value is None:
        return "–"
    digits = 3 if abs(value) < 10 else 2 if abs(value) < 100 else 1
    return f"{value:{'+' if signed else ''}.{digits}f}"
