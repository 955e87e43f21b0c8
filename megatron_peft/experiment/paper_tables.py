"""The paper's own numbers as tables of a report, and ours beside them. None of the paper's was measured here."""

from collections.abc import Sequence

from megatron_peft.experiment import paper
from megatron_peft.experiment.tables import Row, Table, format_number, papers_method


def table1() -> Table:
    """As printed: runs, then the average; averages that are not those of their runs are marked."""
    lines: list[tuple[str, ...]] = []
    for benchmark, methods in paper.facts()["table"].items():
        for at, method in enumerate(methods):
            heading = f"{benchmark}, {paper.facts()['units'][benchmark]}" if at == 0 else ""
            lines.append((heading, method, *(_runs(_found(benchmark, method, model)) for model in paper.models())))
            lines.append(("", "Avg", *(_average(_found(benchmark, method, model)) for model in paper.models())))
    return Table(
        "The paper's Table I, as printed; none of it was measured here",
        ("Benchmark", "Method", *paper.models()),
        tuple(lines),
        "A dagger marks an average that is not the mean of its three runs. HumanEval: pass@1, then pass@10.",
        text_columns=2,
        is_sortable=False,
    )


def beside_ours(rows: Sequence[Row]) -> list[Table]:
    """For each task with a benchmark of the paper: our means of its first score, and the paper's averages."""
    tables: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        task = row.result.group.task
        benchmark = task.paper or task.name
        if benchmark in paper.benchmarks() and task.score and row.metric == next(iter(task.score.metrics)):
            tables.setdefault((task.name, row.metric, benchmark), []).append(row)
    return [_beside(task, metric, benchmark, found) for (task, metric, benchmark), found in tables.items()]


def _beside(task: str, metric: str, benchmark: str, rows: Sequence[Row]) -> Table:
    ours = list(dict.fromkeys(row.result.model for row in rows))
    means = {(row.result.method, row.result.model): format_number(row.mean) for row in rows}
    methods = {row.result.method: papers_method(row.result) for row in rows}
    return Table(
        f"Ours, {task} ({metric}), beside the paper's averages of {benchmark} ({paper.facts()['units'][benchmark]})",
        ("method", *(f"ours: {model}" for model in ours), *(f"paper: {model}" for model in paper.models())),
        tuple(
            (
                method,
                *(means.get((method, model), "–") for model in ours),
                *(_average(_found(benchmark, papers, model)) for model in paper.models()),
            )
            for method, papers in methods.items()
        ),
    )


def wrong_averages_table() -> Table:
    """The printed averages that are not the mean of the printed runs."""
    found = paper.wrong_averages()
    return Table(
        f"{len(found)} of the paper's {len(paper.entries())} averages are not the mean of their printed runs",
        ("benchmark", "method", "model", "runs", "mean of the runs", "printed average"),
        tuple(
            (
                f"{one.benchmark} {one.metric}".strip(),
                one.method,
                one.model,
                " / ".join(f"{run:.1f}" for run in one.runs),
                f"{one.mean_of_runs:.2f}",
                f"{one.average:.1f}",
            )
            for one in found
        ),
        text_columns=4,
    )


def resources() -> Table:
    """The numbers for figure 1 in the paper's text; the figure itself has none."""
    return Table(
        "The paper on figure 1 (A100s; not measured here)",
        ("model", "method", "minutes an epoch", "memory (GB)"),
        tuple(
            (model, method, str(found.get("minutes_per_epoch", "–")), str(found.get("memory_gb", "–")))
            for model, methods in paper.facts()["resources"].items()
            for method, found in methods.items()
        ),
        text_columns=2,
    )


def dynamics() -> Table:
    """The numbers for figure 2 in the paper's text."""
    return Table(
        "The paper on figure 2 (ten epochs; not measured here)",
        ("model", "method", "what", "value"),
        tuple(
            (model, method, name.replace("_", " "), _value(value))
            for model, methods in paper.facts()["dynamics"].items()
            for method, found in methods.items()
            for name, value in found.items()
        ),
        text_columns=3,
    )


def _value(value: float | Sequence[float]) -> str:
    return f"{value:.2f}" if isinstance(value, float | int) else " to ".join(f"{one:.2f}" for one in value)


def _found(benchmark: str, method: str | None, model: str) -> list[paper.Entry]:
    return [one for one in paper.entries() if (one.benchmark, one.method, one.model) == (benchmark, method, model)]


def _runs(entries: Sequence[paper.Entry]) -> str:
    return " / ".join(f"{run:.1f}" for one in entries for run in one.runs) or "–"


def _average(entries: Sequence[paper.Entry]) -> str:
    return " / ".join(f"{one.average:.1f}" + ("" if one.average_is_of_runs else "†") for one in entries) or "–"
