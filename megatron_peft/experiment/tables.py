"""Table I: each method's runs, their mean and spread, and a paired test against one method; tables as text."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import NamedTuple

from megatron_peft.config import METHODS, PeftConfig, require
from megatron_peft.experiment.results import (
    Comparison,
    Result,
    Results,
    compare_seeds,
    metrics,
    shown_metrics,
    steps_to,
)
from megatron_peft.experiment.spec import span

LATEX = {character: f"\\{character}" for character in "&%$#_{}"}
LATEX |= {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
LATEX |= {"<": "$<$", "±": r"$\pm$", "†": r"$^\dagger$", "–": "--", "≥": r"$\ge$"}
BEST = "*"  # the first character of a highlighted cell; CSV leaves it out


@dataclass(frozen=True)
class Table:
    """Columns and rows of text, `title` above and `note` below.

    text_columns: the first so many are words, aligned left; the others are numbers.
    is_sortable: whether the order of the rows is free; is_prose: whether cells are texts of several lines.
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

        def shown(cell: str) -> str:
            escaped = cell.removeprefix(BEST).replace("|", "\\|")
            return f"**{escaped}**" if cell.startswith(BEST) else escaped

        rule = ["---" if at < self.text_columns else "---:" for at in range(len(self.columns))]
        lines = [f"| {' | '.join(row)} |" for row in (self.columns, rule, *(map(shown, row) for row in self.rows))]
        return "\n".join([f"**{self.title}**", "", *lines, *(["", self.note] if self.note else [])]) + "\n"

    def csv(self) -> str:
        output = io.StringIO()
        writer = csv.writer(output, lineterminator="\n")
        writer.writerows([self.columns, *([cell.removeprefix(BEST) for cell in row] for row in self.rows)])
        return output.getvalue()

    def latex(self) -> str:
        """A table environment that needs no package."""

        def shown(cell: str) -> str:
            text = cell.removeprefix(BEST).translate(str.maketrans(LATEX))
            return f"\\textbf{{{text}}}" if cell.startswith(BEST) else text

        alignment = "l" * self.text_columns + "r" * (len(self.columns) - self.text_columns)
        caption = shown(f"{self.title}. {self.note}".strip())
        lines = [r"\begin{table}", r"\centering", f"\\caption{{{caption}}}", f"\\begin{{tabular}}{{{alignment}}}"]
        columns, *rows = [" & ".join(map(shown, row)) + r" \\" for row in (self.columns, *self.rows)]
        lines += [r"\hline", columns, r"\hline"]
        # A line above each group of rows, where the first column is only filled at a group's start.
        is_grouped = any(not row[0] for row in self.rows)
        for at, row in enumerate(rows):
            lines += [r"\hline", row] if at and is_grouped and self.rows[at][0] else [row]
        return "\n".join([*lines, r"\hline", r"\end{tabular}", r"\end{table}"]) + "\n"


def format_number(value: float | None, signed: bool = False) -> str:
    """Four significant digits or so: losses with three after the point, scores with one or two."""
    if value is None:
        return "–"
    return f"{value:{'+' if signed else ''}.{_digits(value)}f}"


def format_p(p: float | None) -> str:
    """A probability, to three digits after the point."""
    return "–" if p is None else f"{p:.3f}" if p >= 0.001 else "< 0.001"


def with_spread(mean: float | None, deviation: float | None) -> str:
    """A mean and its standard deviation, to the same digit."""
    if mean is None or deviation is None:
        return format_number(mean)
    return f"{format_number(mean)} ± {deviation:.{_digits(mean)}f}"


def _digits(value: float) -> int:
    return 3 if abs(value) < 10 else 2 if abs(value) < 100 else 1


class Row(NamedTuple):
    """A metric of a method on a task with a model.

    runs: in the order of the experiment's seeds; None for a missing run, and for a seed that the method does not have.
    deviation: of the sample (n - 1).
    against: the comparison with the reference method; None for itself and without a test.
    is_best: whether no other method is better over the seeds that both have.
    """

    result: Result
    metric: str
    runs: tuple[float | None, ...]
    mean: float | None
    deviation: float | None
    against: Comparison | None
    is_best: bool

    @property
    def average(self) -> str:
        """The mean with its spread, marked if it is the best; a dash without a mean."""
        return (BEST if self.is_best else "") + with_spread(self.mean, self.deviation)


def reference_method(results: Results, chosen: str | None) -> str:
    """The method that others are tested against: the chosen one, `hybrid`, the first Hybrid, or the first of all.

    Raises ConfigurationError: the experiment has no such method.
    """
    names = [method.name for method in results.experiment.methods]
    if chosen is not None:
        require(chosen in names, f"--against {chosen}: the experiment's methods are {', '.join(names)}.")
        return chosen
    mixing = {name for name, method in METHODS.items() if method.mixes}
    mixed = [method.name for method in results.experiment.methods if method.peft_method in mixing]
    return ([name for name in mixed if name in mixing] or mixed or names)[0]


def rows(results: Results, reference: str) -> list[Row]:
    """The rows of all results, by model, task, metric and method."""
    table_rows = []
    for of_place in (results.of(*place) for place in results.places()):
        for metric, higher in metrics(of_place[0].group.task).items():
            values = {result.method: result.values(metric) for result in of_place}
            means = {method: mean(by_seed.values()) for method, by_seed in values.items() if by_seed}
            best = [
                method for method in means if not any(_is_worse(values[method], one, higher) for one in values.values())
            ]
            for result in of_place:
                method, by_seed = result.method, values[result.method]
                row = Row(
                    result,
                    metric,
                    runs=tuple(by_seed.get(seed) for seed in results.experiment.all_seeds),
                    mean=means.get(method),
                    deviation=stdev(by_seed.values()) if len(by_seed) > 1 else None,
                    against=None if method == reference else compare_seeds(by_seed, values[reference]),
                    is_best=len(means) > 1 and method in best,
                )
                table_rows.append(row)
    return table_rows


def _is_worse(values: Mapping[int, float], others: Mapping[int, float], higher: bool) -> bool:
    """Whether others' mean is better over the seeds that both have. Args: higher: whether that is better."""
    difference = sum(others[seed] - values[seed] for seed in values.keys() & others.keys())
    return difference > 0 if higher else difference < 0


def by_score(results: Results, table_rows: Sequence[Row]) -> Table:
    """A line per method and a column per score, or the validation loss of a task without scores."""
    experiment = results.experiment
    averages = {(row.result.model, row.result.task, row.metric, row.result.method): row.average for row in table_rows}
    places = [
        (model.name, task.name, metric)
        for model in experiment.models
        for task in experiment.tasks
        for metric in shown_metrics(task)
    ]
    names = [", ".join(place[0 if len(experiment.models) > 1 else 1 :]) for place in places]
    seeds: dict[str, list[str]] = {}  # "3 to 6" -> scores whose means are of so many
    for place, name in zip(places, names, strict=True):
        of_place = (row for row in table_rows if (row.result.model, row.result.task, row.metric) == place)
        if counts := [sum(run is not None for run in row.runs) for row in of_place if row.mean is not None]:
            seeds.setdefault(span(counts), []).append(name)
    usual = max(seeds, key=lambda counts: len(seeds[counts]), default="0")
    others = "; ".join(f"{', '.join(scores)}: {counts}" for counts, scores in seeds.items() if counts != usual)
    return Table(
        f"Mean ± standard deviation of {usual} seeds{f' ({others})' if others else ''}",
        ("method", *names),
        tuple(
            (method.name, *(averages.get((*place, method.name), "–") for place in places))
            for method in experiment.methods
        ),
    )


def with_test(table_rows: Sequence[Row], reference: str, num_seeds: int) -> Table:
    """A line per row, with the test."""

    def line(row: Row) -> tuple[str, ...]:
        test = row.against
        return (
            *(row.result.model, row.result.task, row.metric, row.result.method),
            *(format_number(run) for run in row.runs),
            (BEST if row.is_best else "") + format_number(row.mean),
            format_number(row.deviation),
            format_number(test.difference, signed=True) if test else "–",
            f"{format_number(test.low, signed=True)} to {format_number(test.high, signed=True)}" if test else "–",
            format_p(test.p if test else None),
        )

    runs = tuple(f"run {at}" for at in range(1, num_seeds + 1))
    return Table(
        f"Runs, mean, standard deviation, and a paired t-test against {reference}",
        ("model", "task", "metric", "method", *runs, "mean", "sd", f"minus {reference}", "95% interval", "p"),
        tuple(map(line, table_rows)),
        "Bold: no method is better over the seeds that both have. The test pairs runs of the same seed; of few seeds "
        "it sees large differences only, and p is not corrected for the number of methods.",
        text_columns=4,
    )


def in_the_papers_form(results: Results, table_rows: Sequence[Row]) -> Table:
    """Two lines per method, its runs and their mean; a column per model."""
    models = [model.name for model in results.experiment.models]
    cells = {(row.result.task, row.metric, row.result.method, row.result.model): row for row in table_rows}
    lines: list[tuple[str, ...]] = []
    last_heading = ""
    for task, metric, method in dict.fromkeys(key[:3] for key in cells):
        of_models = [cells.get((task, metric, method, model)) for model in models]
        heading = f"{task} ({metric})"
        runs = (" / ".join(map(format_number, row.runs)) if row else "–" for row in of_models)
        lines.append(("" if heading == last_heading else heading, method, *runs))
        lines.append(("", "Avg", *(row.average if row else "–" for row in of_models)))
        last_heading = heading
    return Table(
        "Ours: each run and the average",
        ("Benchmark", "Method", *models),
        tuple(lines),
        "Average ± standard deviation of the sample; the best of each benchmark is bold.",
        text_columns=2,
        is_sortable=False,
    )


def speed_table(results: Results, model: str, task: str) -> Table | None:
    """A line per method, a column per measurement; None without LoRA's runs, or with fewer than two columns."""
    of_place = results.of(model, task)
    lora = (result for result in of_place if result.group.method.peft_method == PeftConfig.method and result.finals)
    base = next(lora, None)
    if base is None:
        return None
    measured = {
        result.method: {compared.steps: compared for compared in steps_to(result.finals, base.finals)}
        for result in of_place
        if result is not base
    }
    steps = sorted({step for by_step in measured.values() for step in by_step})
    if len(steps) < 2:
        return None
    return Table(
        f"Times fewer steps than {base.method} to {base.method}'s validation loss after N steps ({model}, {task})",
        ("method", *(f"N = {step}" for step in steps)),
        tuple(
            (method, *(str(by_step.get(step, "–")) for step in steps))
            for method, by_step in measured.items()
            if by_step
        ),
        "N over the mean number of steps that the method's runs need, seed by seed, linear between measurements; above "
        "1 it is faster. '≥' where the first measurement is at or below the loss already; k/n where only k of n runs "
        "reach it: those that do are the faster ones. All rates decay to 0 at the end of the run, so N before the end "
        "is not a run of N steps.",
    )
