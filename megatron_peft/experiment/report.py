"""A report of an experiment: sections of text, tables and figures, and the files that they become."""

import base64
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jinja2 import Environment, PackageLoader
from matplotlib.figure import Figure

from megatron_peft.experiment import paper
from megatron_peft.experiment.results import Result, Results
from megatron_peft.experiment.tables import Row, in_the_papers_form, rows, with_test
from megatron_peft.reporting import cost_plot, dynamics_plot, lambda_plot, paper_tables, speed_table, summary
from megatron_peft.reporting.drawing import save, svg
from megatron_peft.reporting.table import BEST, Table

PAGE = "page.html.jinja"


@dataclass(frozen=True)
class Section:
    """A heading with what is under it.

    Attributes:
        figures: by the name of their files.
        is_papers: whether it shows the paper's numbers, none of which was measured here.
    """

    title: str
    texts: Sequence[str] = ()
    tables: Sequence[Table] = ()
    figures: Mapping[str, Figure] = field(default_factory=dict)
    is_papers: bool = False


@dataclass(frozen=True)
class Report:
    """All of it. `files`: text files beside the pages, by name."""

    title: str
    sections: tuple[Section, ...]
    files: Mapping[str, str]


def build(results: Results, reference: str) -> Report:
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
    yield Section("Result", [summary.state(results), *summary.verdicts(found), *summary.budgets(results)])
    yield Section("Table I", tables=[ours, long])
    yield from _papers_table1(found)
    yield Section("Figure 1: cost", tables=[cost_plot.table(results)], figures=_cost_figures(results))
    yield Section("Figure 1 in the paper", tables=[paper_tables.resources()], is_papers=True)
    yield Section("Figure 2: gradient norm and validation loss", figures=_dynamics_figures(results))
    yield Section("Figure 2 in the paper", tables=[paper_tables.dynamics()], is_papers=True)
    speeds = [table for place in results.places() if (table := speed_table.table(results, *place))]
    if speeds:
        yield Section("Steps to LoRA's loss", tables=speeds)
    lambdas = _lambda_figures(results)
    if lambdas:
        yield Section("Lambda by layer", ["Means over the final runs."], figures=lambdas)
    yield Section(
        "How it was made", [summary.versions(results), *summary.provenance(results)], [summary.tuning(results)]
    )


def _papers_table1(found: Sequence[Row]) -> Iterator[Section]:
    beside = paper_tables.beside_ours(found)
    if beside:
        note = "Other models and other data: what can be compared is the order of the methods."
        yield Section("Table I beside the paper's", [note], beside)
    source = f"Source: {paper.paper()['source']}."
    yield Section(
        "Table I in the paper", [source], [paper_tables.table1(), paper_tables.wrong_averages()], is_papers=True
    )


def _cost_figures(results: Results) -> dict[str, Figure]:
    return {f"figure1-{task}": cost_plot.draw(results, task) for task in dict.fromkeys(t for _, t in results.places())}


def _dynamics_figures(results: Results) -> dict[str, Figure]:
    return {f"figure2-{model}-{task}": dynamics_plot.draw(results, model, task) for model, task in results.places()}


def _lambda_figures(results: Results) -> dict[str, Figure]:
    return {
        f"lambda-{result.model}-{result.task}-{result.method}": _lambda_figure(result)
        for result in results.all
        if any(record.lambdas for record in result.finals.values())
    }


def _lambda_figure(result: Result) -> Figure:
    runs = [record.lambdas for record in result.finals.values() if record.lambdas]
    title = f"{result.method} on {result.task} with {result.model}"
    return lambda_plot.draw(title, runs[0]["iterations"], lambda_plot.mean_by_layer([run["by_layer"] for run in runs]))


def markdown(report: Report) -> str:
    """The report as Markdown; its figures are files beside it."""
    parts = [f"# {report.title}"]
    for section in report.sections:
        parts += [f"## {section.title}", *section.texts, *(table.markdown().rstrip() for table in section.tables)]
        parts += [f"![{name}]({name}.svg)" for name in section.figures]
    return "\n\n".join(parts) + "\n"


def html(report: Report) -> str:
    """One page that needs nothing else: plots, style and script are in it."""
    environment = Environment(loader=PackageLoader("megatron_peft.experiment", "."), autoescape=True, trim_blocks=True)
    environment.filters["svg_base64"] = lambda figure: base64.b64encode(svg(figure).encode()).decode()
    environment.filters["plain"] = lambda text: text.replace("**", "").replace("`", "")
    return environment.get_template(PAGE).render(report=report, best=BEST)


def write(report: Report, folder: Path) -> list[Path]:
    """report.md, report.html, table1.csv and .tex, and the figures as PNG and SVG; what was written."""
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
