"""The report of an experiment: sections of text, tables and figures, written as Markdown, HTML, CSV and LaTeX."""

import base64
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

from jinja2 import Environment, PackageLoader
from matplotlib.figure import Figure

from megatron_peft.experiment import paper, plots
from megatron_peft.experiment.cells import command_line
from megatron_peft.experiment.plots import save, svg
from megatron_peft.experiment.record import has_provenance
from megatron_peft.experiment.results import Result, Results, peft_method
from megatron_peft.experiment.spec import budget, grid_size
from megatron_peft.experiment.tables import (
    BEST,
    Row,
    Table,
    format_number,
    in_the_papers_form,
    papers_method,
    rows,
    speed_table,
    with_test,
)


def state(results: Results) -> str:
    """How many final runs are finished."""
    have, whole = results.num_finals()
    seeds = ", ".join(map(str, results.experiment.seeds))
    done = f"{have} of {whole} final runs are in (seeds {seeds})."
    if have == whole:
        return done
    missing: dict[str, list[str]] = {}
    for result in results.all:
        if len(result.finals) < len(results.experiment.seeds):
            missing.setdefault(f"{result.model}, {result.task}", []).append(result.method)
    places = "; ".join(f"{place}: {', '.join(methods)}" for place, methods in missing.items())
    return f"**Not finished:** {done} Missing runs: {places}."


def budgets(results: Results) -> list[str]:
    """The common budget of all methods: a sentence for each task, or for each task and model if models differ."""
    experiment = results.experiment
    tries = grid_size(experiment.methods[0])
    tuning = (
        "rates are given, not tuned"
        if tries == 1
        else f"{tries} tuning runs a method with seed {experiment.tuning_seed}, chosen by validation loss alone"
    )
    sentences = []
    for task in experiment.tasks:
        flags = {model.name: " ".join(command_line(budget(experiment, model, task))) for model in experiment.models}
        places = {task.name: flags[experiment.models[0].name]}
        if len(set(flags.values())) > 1:
            places = {f"{task.name} with {model}": line for model, line in flags.items()}
        sentences += [
            f"All methods have the same budget on {place}: {tuning}; {len(experiment.seeds)} runs with these settings; "
            f"each with `{line}`."
            for place, line in places.items()
        ]
    return sentences


def verdicts(rows: Sequence[Row]) -> list[str]:
    """A sentence for each model, task and metric."""
    return [
        sentence
        for (model, task, metric), group in groupby(rows, lambda row: (row.result.model, row.result.task, row.metric))
        for sentence in _verdict(f"{model}, {task}, {metric}", list(group))
    ]


def _verdict(place: str, rows: Sequence[Row]) -> Iterator[str]:
    have = [row for row in rows if row.mean is not None]
    best = next((row for row in have if row.is_best), None)
    if best is None:
        return
    so_far = "so far, " if any(run is None for row in rows for run in row.runs) else ""
    first = (
        f"{place}: {so_far}{best.result.method} has the best mean of {len(have)} methods, {format_number(best.mean)}."
    )
    yield f"{first} {_hybrid(have)}".rstrip()


def _hybrid(rows: Sequence[Row]) -> str:
    hybrid = next((row for row in rows if peft_method(row.result.group.method) == "hybrid"), None)
    if hybrid is None:
        return ""
    if hybrid.is_best:
        return "That is the Hybrid."
    assert hybrid.mean is not None
    ahead = [row.result.method for row in rows if row.mean is not None and _is_ahead(row, hybrid.mean, rows)]
    return f"The Hybrid ({hybrid.result.method}, {format_number(hybrid.mean)}) ranks behind {', '.join(ahead)}."


def _is_ahead(row: Row, mean: float, rows: Sequence[Row]) -> bool:
    """Whether the row is better than `mean`, in the direction of the best method."""
    best = next(other.mean for other in rows if other.is_best)
    assert row.mean is not None and best is not None
    return row.mean > mean if best > mean else row.mean < mean


def tuning(results: Results) -> Table:
    """The settings that were tried, and their validation losses."""
    return Table(
        "Settings that were tried",
        ("model", "task", "method", "settings", "seed", "validation loss", "chosen"),
        tuple(
            (
                *(result.model, result.task, result.method),
                " ".join(f"{name}={value}" for name, value in cell.settings.items()) or _own_flags(cell.flags),
                str(cell.seed),
                format_number(record.validation_loss) if record and record.is_trained else "failed" if record else "–",
                "yes" if result.finals and dict(cell.settings) == dict(result.settings) else "",
            )
            for result in results.all
            for cell, record in result.tuning
        ),
        text_columns=4,
    )


def _own_flags(flags: Sequence[str]) -> str:
    """The learning rate, for a method without a grid."""
    return f"lr={flags[flags.index('--lr') + 1]}" if "--lr" in flags[:-1] else ""


def versions_of_runs(results: Results) -> str:
    """The versions of the final runs."""
    found: dict[str, dict[str, None]] = {}
    for result in results.all:
        for record in result.finals.values():
            for name, value in record.versions.items():
                found.setdefault(name, {})[value] = None
    return "Versions: " + "; ".join(f"{name} {', '.join(values)}" for name, values in found.items()) + "."


def provenance(results: Results) -> Iterator[str]:
    """How many cells have a provenance, and which do not."""
    records = results.records()
    silent = [key for key, record in records.items() if not has_provenance(record)]
    if silent:
        yield (
            f"**{len(silent)} of {len(records)} cells have no digests of their experiment file and data:** "
            "their records are older."
        )
        yield f"They are {'; '.join(silent)}."
    else:
        yield f"All {len(records)} cells record their experiment file, commit and data."


# The paper's Table I and its other numbers, as tables of a report.


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


PAGE = "page.html.jinja"


@dataclass(frozen=True)
class Section:
    """A heading and its content.

    Attributes:
        figures: by the names of their files.
        is_papers: whether it shows the paper's numbers, which were not measured here.
    """

    title: str
    texts: Sequence[str] = ()
    tables: Sequence[Table] = ()
    figures: Mapping[str, Figure] = field(default_factory=dict)
    is_papers: bool = False


@dataclass(frozen=True)
class Report:
    """The whole report. `files`: text files beside the pages, by name."""

    title: str
    sections: tuple[Section, ...]
    files: Mapping[str, str]


def build_report(results: Results, reference: str) -> Report:
    """Args: reference: the method that the others are tested against."""
    found = rows(results, reference)
    ours = in_the_papers_form(results, found)
    long = with_test(found, reference, len(results.experiment.seeds))
    return Report(
        results.experiment.title,
        tuple(_sections(results, found, ours, long)),
        {"table1.csv": long.csv(), "table1.tex": ours.latex(), "table1-tested.tex": long.latex()},
    )


def _sections(results: Results, found: Sequence[Row], ours: Table, long: Table) -> Iterator[Section]:
    yield Section("Result", [state(results), *verdicts(found), *budgets(results)])
    yield Section("Table I", tables=[ours, long])
    yield from _papers_table1(found)
    yield Section("Figure 1: cost", tables=[plots.cost_table(results)], figures=_cost_figures(results))
    yield Section("Figure 1 in the paper", tables=[resources()], is_papers=True)
    yield Section("Figure 2: gradient norm and validation loss", figures=_dynamics_figures(results))
    yield Section("Figure 2 in the paper", tables=[dynamics()], is_papers=True)
    speeds = [table for place in results.places() if (table := speed_table(results, *place))]
    if speeds:
        yield Section("Steps to LoRA's loss", tables=speeds)
    lambdas = _lambda_figures(results)
    if lambdas:
        yield Section("Lambda by layer", ["Means over the final runs."], figures=lambdas)
    yield Section("How it was made", [versions_of_runs(results), *provenance(results)], [tuning(results)])


def _papers_table1(found: Sequence[Row]) -> Iterator[Section]:
    beside = beside_ours(found)
    if beside:
        note = "Other models and other data: what can be compared is the order of the methods."
        yield Section("Table I beside the paper's", [note], beside)
    source = f"Source: {paper.facts()['source']}."
    yield Section("Table I in the paper", [source], [table1(), wrong_averages_table()], is_papers=True)


def _cost_figures(results: Results) -> dict[str, Figure]:
    return {f"figure1-{task}": plots.draw_cost(results, task) for task in dict.fromkeys(t for _, t in results.places())}


def _dynamics_figures(results: Results) -> dict[str, Figure]:
    return {f"figure2-{model}-{task}": plots.draw_dynamics(results, model, task) for model, task in results.places()}


def _lambda_figures(results: Results) -> dict[str, Figure]:
    return {
        f"lambda-{result.model}-{result.task}-{result.method}": _lambda_figure(result)
        for result in results.all
        if any(record.lambdas for record in result.finals.values())
    }


def _lambda_figure(result: Result) -> Figure:
    runs = [record.lambdas for record in result.finals.values() if record.lambdas]
    title = f"{result.method} on {result.task} with {result.model}"
    return plots.draw_lambdas(title, runs[0]["iterations"], plots.mean_by_layer([run["by_layer"] for run in runs]))


def markdown(report: Report) -> str:
    """The report as Markdown; its figures are files beside it."""
    parts = [f"# {report.title}"]
    for section in report.sections:
        parts += [f"## {section.title}", *section.texts, *(table.markdown().rstrip() for table in section.tables)]
        parts += [f"![{name}]({name}.svg)" for name in section.figures]
    return "\n\n".join(parts) + "\n"


def html(report: Report) -> str:
    """One page that contains its plots, style and script."""
    environment = Environment(loader=PackageLoader("megatron_peft.experiment", "."), autoescape=True, trim_blocks=True)
    environment.filters["svg_base64"] = lambda figure: base64.b64encode(svg(figure).encode()).decode()
    environment.filters["plain"] = lambda text: text.replace("**", "").replace("`", "")
    return environment.get_template(PAGE).render(report=report, best=BEST)


def write(report: Report, folder: Path) -> list[Path]:
    """Write report.md, report.html, table1.csv and .tex, and the figures as PNG and SVG; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = {"report.md": markdown(report), "report.html": html(report), **report.files}
    for name, text in texts.items():
        temporary = folder / f".{name}"
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(folder / name)
    figures = {name: figure for section in report.sections for name, figure in section.figures.items()}
    for name, figure in figures.items():
        save(figure, folder, name)
    return [folder / name for name in (*texts, *(f"{name}.svg" for name in figures))]
