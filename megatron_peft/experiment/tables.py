"""Table I: each method's runs, their mean and spread, and a paired test against one method; the paper's beside it."""

import csv
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from megatron_peft.config import METHODS, ConfigurationError, PeftConfig, require
from megatron_peft.experiment import paper
from megatron_peft.experiment.results import (
    VALIDATION_LOSS,
    Comparison,
    Result,
    Results,
    StepsTo,
    compare_seeds,
    metrics,
    peft_method,
    steps_to,
)
from megatron_peft.experiment.spec import Choice

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
BEST = "*"  # the first character of a highlighted cell; CSV leaves it out


@dataclass(frozen=True)
class Table:
    """Columns and rows of text.

    Attributes:
        title: above it; note: below it.
        text_columns: the first so many are words, aligned left; the others are numbers.
        is_sortable: whether the order of the rows is free.
        is_prose: whether cells are texts of several lines.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    text_columns: int = 1
    is_sortable: bool = True
    is_prose: bool = False

    def __post_init__(self) -> None:
        assert all(len(row) == len(self.columns) for row in self.rows), self.title

    def markdown(self) -> str:
        """A table of Markdown with its title above and its note below."""
        rule = ["---" if at < self.text_columns else "---:" for at in range(len(self.columns))]
        body = [[_markdown_cell(cell) for cell in row] for row in self.rows]
        lines = [f"| {' | '.join(row)} |" for row in (list(self.columns), rule, *body)]
        return "\n".join([f"**{self.title}**", "", *lines, *(["", self.note] if self.note else [])]) + "\n"

    def csv(self) -> str:
        """Comma-separated values, without marks of the best."""
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
    """The text with LaTeX's special characters escaped."""
    return re.sub("|".join(map(re.escape, LATEX)), lambda found: LATEX[found.group()], text)


def _markdown_cell(cell: str) -> str:
    escaped = cell.removeprefix(BEST).replace("|", "\\|")
    return f"**{escaped}**" if cell.startswith(BEST) else escaped


def _latex_cell(cell: str) -> str:
    text = latex_text(cell.removeprefix(BEST))
    return f"\\textbf{{{text}}}" if cell.startswith(BEST) else text


def format_number(value: float | None, signed: bool = False) -> str:
    """Four significant digits or so: losses with three after the point, scores with one or two."""
    if value is None:
        return "–"
    return f"{value:{'+' if signed else ''}.{_digits(value)}f}"


def with_spread(mean: float | None, deviation: float | None) -> str:
    """A mean and its standard deviation, to the same digit."""
    if mean is None or deviation is None:
        return format_number(mean)
    return f"{format_number(mean)} ± {deviation:.{_digits(mean)}f}"


def _digits(value: float) -> int:
    """Digits after the point."""
    return 3 if abs(value) < 10 else 2 if abs(value) < 100 else 1


@dataclass(frozen=True)
class Row:
    """One metric of one method on one task with one model.

    Attributes:
        runs: in the order of the experiment's seeds; None for a missing run.
        deviation: of the sample (n - 1).
        against: the comparison with the reference method; None for itself and without a test.
        is_best: whether the mean is the best of several methods.
    """

    result: Result
    metric: str
    runs: tuple[float | None, ...]
    mean: float | None
    deviation: float | None
    against: Comparison | None
    is_best: bool


def reference_method(results: Results, chosen: str | None) -> str:
    """The method that others are tested against: the given one, or the first that mixes two (the Hybrid), or the
    first of all.

    Raises ConfigurationError: the experiment has no such method.
    """
    names = [method.name for method in results.experiment.methods]
    if chosen is not None:
        require(chosen in names, f"--against {chosen}: the experiment's methods are {', '.join(names)}.")
        return chosen
    mixing = {name for name, method in METHODS.items() if method.mixes}
    mixed = [method.name for method in results.experiment.methods if peft_method(method) in mixing]
    return (mixed or names)[0]


def rows(results: Results, reference: str) -> list[Row]:
    """By model, task, metric and method."""
    return [
        row
        for model, task in results.places()
        for metric, higher in metrics(results.of(model, task)[0].group.task).items()
        for row in _rows(results, results.of(model, task), metric, higher, reference)
    ]


def _rows(results: Results, methods: Sequence[Result], metric: str, higher: bool, reference: str) -> Iterator[Row]:
    means = {result.method: mean(values) for result in methods if (values := result.values(metric).values())}
    best = (max if higher else min)(means.values(), default=None)
    against = next(result for result in methods if result.method == reference).values(metric)
    for result in methods:
        values = result.values(metric)
        runs = tuple(values.get(seed) for seed in results.experiment.seeds)
        yield Row(
            result,
            metric,
            runs,
            means.get(result.method),
            stdev(values.values()) if len(values) > 1 else None,
            None if result.method == reference else compare_seeds(values, against),
            len(means) > 1 and means.get(result.method) == best,
        )


def papers_method(result: Result) -> str | None:
    """The method's name in the paper, if it is one of its six."""
    return result.group.method.paper or paper.METHODS.get(result.method)


def check_paper_names(results: Results) -> None:
    """Raises ConfigurationError for a `paper:` in the experiment's file that is not in the paper's Table I."""
    known = {
        "models": (results.experiment.models, paper.models()),
        "tasks": (results.experiment.tasks, paper.benchmarks()),
        "methods": (results.experiment.methods, list(paper.METHODS.values())),
    }
    problems = [problem for kind, (choices, names) in known.items() for problem in _unknown(kind, choices, names)]
    if problems:
        raise ConfigurationError(*problems)


def _unknown(kind: str, choices: Sequence[Choice], names: Sequence[str]) -> Iterator[str]:
    for choice in choices:
        if choice.paper is not None and choice.paper not in names:
            yield f"{kind}.{choice.name}.paper is {choice.paper!r}; the paper has {', '.join(names)}."


def shown_metrics(task: Choice) -> list[str]:
    """The scores of a task, or the validation loss of a task without scores."""
    return [metric for metric in metrics(task) if metric != VALIDATION_LOSS or task.score is None]


def by_score(results: Results, table_rows: Sequence[Row]) -> Table:
    """A line per method and a column per score, or the validation loss of a task without scores."""
    experiment = results.experiment
    cells = {(row.result.model, row.result.task, row.metric, row.result.method): row for row in table_rows}
    places = [
        (model.name, task.name, metric)
        for model in experiment.models
        for task in experiment.tasks
        for metric in shown_metrics(task)
    ]
    return Table(
        f"Mean ± standard deviation of {len(experiment.seeds)} seeds",
        ("method", *(", ".join(place[0 if len(experiment.models) > 1 else 1 :]) for place in places)),
        tuple(
            (method.name, *(_average_of(cells.get((*place, method.name))) for place in places))
            for method in experiment.methods
        ),
    )


def with_test(table_rows: Sequence[Row], reference: str, num_seeds: int) -> Table:
    """A line per row, with the test."""
    runs = tuple(f"run {at}" for at in range(1, num_seeds + 1))
    columns = ("model", "task", "metric", "method", *runs, "mean", "sd", f"minus {reference}", "95% interval", "p")
    return Table(
        f"Runs, mean, standard deviation, and a paired t-test against {reference}",
        columns,
        tuple(_tested_row(row) for row in table_rows),
        "Best means are bold. The test pairs runs of the same seed; of few seeds it sees large differences only, "
        "and p is not corrected for the number of methods.",
        text_columns=4,
    )


def _tested_row(row: Row) -> tuple[str, ...]:
    test = row.against
    return (
        *(row.result.model, row.result.task, row.metric, row.result.method),
        *(format_number(run) for run in row.runs),
        (BEST if row.is_best else "") + format_number(row.mean),
        format_number(row.deviation),
        format_number(test.difference, signed=True) if test else "–",
        f"{format_number(test.low, signed=True)} to {format_number(test.high, signed=True)}" if test else "–",
        f"{test.p:.3f}" if test else "–",
    )


def in_the_papers_form(results: Results, table_rows: Sequence[Row]) -> Table:
    """Two lines per method, its runs and their mean; a column per model."""
    models = [model.name for model in results.experiment.models]
    cells = {(row.result.task, row.metric, row.result.method, row.result.model): row for row in table_rows}
    lines: list[tuple[str, ...]] = []
    seen = ""
    for task, metric, method in dict.fromkeys(key[:3] for key in cells):
        found = [cells.get((task, metric, method, model)) for model in models]
        heading = f"{task} ({metric})"
        lines.append(("" if heading == seen else heading, method, *(_runs_of(row) for row in found)))
        lines.append(("", "Avg", *(_average_of(row) for row in found)))
        seen = heading
    return Table(
        "Ours: each run and the average",
        ("Benchmark", "Method", *models),
        tuple(lines),
        "Average ± standard deviation of the sample; the best of each benchmark is bold.",
        text_columns=2,
        is_sortable=False,
    )


def _runs_of(row: Row | None) -> str:
    return " / ".join(format_number(run) for run in row.runs) if row else "–"


def _average_of(row: Row | None) -> str:
    if row is None or row.mean is None:
        return "–"
    return (BEST if row.is_best else "") + with_spread(row.mean, row.deviation)


def speed_table(results: Results, model: str, task: str) -> Table | None:
    """A line per method, a column per measurement; None without a run of the default method, LoRA."""
    found = results.of(model, task)
    usual = (one for one in found if peft_method(one.group.method) == PeftConfig.method and one.finals)
    base = next(usual, None)
    if base is None:
        return None
    measured = {result.method: steps_to(result.finals, base.finals) for result in found if result is not base}
    lines = {method: steps for method, steps in measured.items() if steps}
    steps = sorted({one.steps for line in lines.values() for one in line})
    return Table(
        f"Times fewer steps than {base.method} to {base.method}'s validation loss after N steps ({model}, {task})",
        ("method", *(f"N = {one}" for one in steps)),
        tuple((method, *_cells(line, steps)) for method, line in lines.items()),
        "N over the mean number of steps that the method's runs need, seed by seed, linear between measurements; above "
        "1 it is faster. '≥' where the first measurement is at or below the loss already; (k/n) where only k of n runs "
        "reach it. All rates decay to 0 at the end of the run, so N before the end is not a run of N steps.",
    )


def _cells(line: Sequence[StepsTo], steps: Sequence[int]) -> list[str]:
    found = {one.steps: one for one in line}
    return [_cell(found[one]) if one in found else "–" for one in steps]


def _cell(one: StepsTo) -> str:
    if one.times_fewer is None:
        return f"not reached (0/{one.num_runs})"
    share = "" if one.num_reached == one.num_runs else f" ({one.num_reached}/{one.num_runs})"
    return f"{'≥ ' if one.is_bound else ''}{one.times_fewer:.2f}{share}"
