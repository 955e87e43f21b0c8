"""Reports as sections of text, tables and figures, written as one self-contained HTML page or as Markdown; that of an
experiment: the result in one chart and one table, then what stands behind it.
"""

import base64
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader
from matplotlib.figure import Figure

from megatron_peft.checkpoint.folders import write_atomically
from megatron_peft.config import ConfigurationError
from megatron_peft.experiment import contrasts, plots, tables
from megatron_peft.experiment.cells import command_line
from megatron_peft.experiment.results import Result, Results, metrics, same_runs
from megatron_peft.experiment.spec import span
from megatron_peft.experiment.tables import BEST, Row, Table, format_number

PAGE = "page.html.jinja"
MARKDOWN, HTML = "report.md", "report.html"
SUMMARIZED = ("Result", "Loss", "Speed and memory")  # sections of an experiment, and of a run


@dataclass(frozen=True)
class Section:
    """A heading and its content: figures by the names of their files, texts, then tables.

    is_papers: whether it shows the paper's numbers, which were not measured here.
    is_folded: whether the page shows the heading only, until it is clicked.
    """

    title: str
    texts: Sequence[str] = ()
    tables: Sequence[Table] = ()
    figures: Mapping[str, Figure] = field(default_factory=dict)
    is_papers: bool = False
    is_folded: bool = False


@dataclass(frozen=True)
class Report:
    """The whole report. `files`: text files beside the pages, by name."""

    title: str
    sections: tuple[Section, ...]
    files: Mapping[str, str] = field(default_factory=dict)


def markdown(report: Report) -> str:
    """The report as Markdown; its figures are files beside it."""
    parts = [f"# {report.title}"]
    for section in report.sections:
        parts += [f"## {section.title}", *(f"![{name}]({name}.svg)" for name in section.figures), *section.texts]
        parts += [table.markdown().rstrip() for table in section.tables]
    return "\n\n".join(parts) + "\n"


def html(report: Report) -> str:
    """One page that contains its plots, style and script."""
    environment = Environment(loader=PackageLoader("megatron_peft.experiment", "."), autoescape=True, trim_blocks=True)
    environment.filters["svg_base64"] = lambda figure: base64.b64encode(plots.svg(figure).encode()).decode()
    environment.filters["plain"] = plain
    return environment.get_template(PAGE).render(report=report, best=BEST)


def plain(text: str) -> str:
    """Return a text without Markdown's marks."""
    return text.replace("**", "").replace("`", "")


def summary(report: Report) -> str:
    """Return the texts and tables of the sections in `SUMMARIZED`, for a terminal."""
    sections = [section for section in report.sections if section.title in SUMMARIZED]
    texts = "\n".join(plain(text) for section in sections for text in section.texts)
    return "\n\n".join([texts, *(table.markdown().rstrip() for section in sections for table in section.tables)])


def write(report: Report, folder: Path) -> list[Path]:
    """Write the page, the Markdown, the report's own files, and the figures as PNG and SVG; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = {MARKDOWN: markdown(report), HTML: html(report), **report.files}
    for name, text in texts.items():
        write_atomically(folder / name, text)
    figures = {name: figure for section in report.sections for name, figure in section.figures.items()}
    for name, figure in figures.items():
        plots.save(figure, folder, name)
    return [folder / name for name in (*texts, *(f"{name}.svg" for name in figures))]


def write_page(report: Report, path: Path) -> Path:
    """Write the page alone, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, html(report))
    return path


# The report of an experiment.


def build_report(results: Results, reference: str) -> Report:
    """Args: reference: the method that the others are tested against.

    Raises ConfigurationError for a `paper:` in the experiment's file that is not in the paper's Table I.
    """
    check_names(results)
    table_rows = tables.rows(results, reference)
    ours = tables.in_the_papers_form(results, table_rows)
    tested = tables.with_test(table_rows, reference, len(results.experiment.all_seeds))
    return Report(
        results.experiment.title,
        tuple(_sections(results, table_rows, reference, ours, tested)),
        {"table1.csv": tested.csv(), "table1.tex": ours.latex(), "table1-tested.tex": tested.latex()},
    )


def _sections(
    results: Results, table_rows: Sequence[Row], reference: str, ours: Table, tested: Table
) -> Iterator[Section]:
    experiment, places = results.experiment, results.places()
    answers = contrasts.answers(results)
    remarks = [*not_tuned(results), *verdicts(table_rows, reference)]
    texts = [state(results), *contrasts.sentences(results, answers), *remarks, _budget_sentence(results)]
    yield Section("Result", texts, [tables.by_score(results, table_rows)], {"result": plots.draw_results(table_rows)})
    if answers:
        yield Section("Contrasts", tables=[contrasts.contrast_table(answers)])
    curves = {f"curves-{model}-{task}": plots.draw_dynamics(results, model, task) for model, task in places}
    depths = {f"depth-{model}-{task}": plots.draw_depths(results, model, task) for model, task in places}
    curves |= {name: figure for name, figure in depths.items() if figure}
    yield Section("Validation loss and gradient norm", figures=curves)
    costs = {f"cost-{task}": plots.draw_cost(results, task) for task in dict.fromkeys(task for _, task in places)}
    yield Section("Cost", tables=[plots.cost_table(results)], figures=costs)
    if speeds := [table for place in places if (table := tables.speed_table(results, *place))]:
        yield Section("Steps to LoRA's loss", tables=speeds)
    lambdas = {
        f"lambda-{result.model}-{result.task}-{result.method}": plots.draw_mean_lambdas(result)
        for result in results.all
        if any(record.lambdas for record in result.finals.values())
    }
    if lambdas:
        yield Section("Lambda by layer", ["Means over the final runs."], figures=lambdas)
    yield Section("All runs and tests", tables=[tested], is_folded=True)
    choices = (*experiment.models, *experiment.tasks, *experiment.methods)
    if any(choice.paper is not None for choice in choices):
        note = "Other models and other data: what can be compared is the order of the methods."
        beside = [ours, *beside_ours(table_rows)]
        yield Section("Table I, in the paper's form", [note], beside, is_folded=True)
        source = f"Source: {facts()['source']}."
        yield Section("The paper's own numbers", [source], papers_tables(), is_papers=True, is_folded=True)
    made = [_versions_of_runs(results), *provenance(results)]
    yield Section("How it was made", made, [_tuning(results), _common_flags(results)], is_folded=True)


def state(results: Results) -> str:
    """How many final runs are finished."""
    seeds = results.experiment.all_seeds
    have = sum(len(result.finals) for result in results.all)
    whole = sum(len(result.group.seeds) for result in results.all)
    done = f"{have} of {whole} final runs are in (seeds {', '.join(map(str, seeds))})."
    if have == whole:
        return done
    missing = [result for result in results.all if len(result.finals) < len(result.group.seeds)]
    return f"**Not finished:** {done} Missing runs: {_by_place(missing)}."


def _by_place(results: Sequence[Result]) -> str:
    methods: dict[str, list[str]] = {}
    for result in results:
        methods.setdefault(f"{result.model}, {result.task}", []).append(result.method)
    return "; ".join(f"{place}: {', '.join(names)}" for place, names in methods.items())


def not_tuned(results: Results) -> Iterator[str]:
    """A sentence for each reason, with the methods that are not tuned for it."""
    begun = [result for result in results.all if result.chosen]
    for reason in dict.fromkeys(result.why_not_tuned for result in begun if not result.is_tuned):
        untuned = [result for result in begun if result.why_not_tuned == reason]
        yield f"**Not tuned,** since {reason}: {_by_place(untuned)}."


def verdicts(rows: Sequence[Row], reference: str) -> list[str]:
    """A sentence for each model, task and metric: which methods are better and worse than the reference method.

    Each is compared with it over the seeds that both have, as in the table of tests. Methods with the same runs count
    once.
    """
    several_models = len({row.result.model for row in rows}) > 1
    sentences, same = [], dict[str, None]()
    for (model, task, metric), group in groupby(rows, lambda row: (row.result.model, row.result.task, row.metric)):
        of_metric = list(group)
        measured = {row.result.method: row for row in of_metric if row.mean is not None}
        distinct = [[one.method for one in each] for each in same_runs(row.result for row in measured.values())]
        others = [measured[first] for first, *rest in distinct if reference not in (first, *rest)]
        if reference not in measured or not others:
            continue
        place = f"{task} with {model}" if several_models else task
        methods: dict[str, list[str]] = {"better": [], "worse": [], "undecided": []}
        higher = metrics(of_metric[0].result.group.task)[metric]
        corrected = contrasts.holm([row.against.p if row.against else 1.0 for row in others])
        for row, p in zip(others, corrected, strict=True):
            is_better = row.against is not None and (row.against.difference > 0) == higher
            is_told_apart = p < contrasts.SIGNIFICANT
            methods[("better" if is_better else "worse") if is_told_apart else "undecided"].append(row.result.method)
        listed = "; ".join(f"**{word}** {', '.join(names)}" for word, names in methods.items() if names)
        is_whole = all(row.result.values(metric).keys() >= row.result.seeds_of(metric) for row in of_metric)
        sentences.append(f"{'On' if is_whole else 'So far, on'} {place}, {metric} against {reference}: {listed}.")
        same |= {
            f"On {place}, {one} has the same runs as {first}: they count once.": None
            for first, *rest in distinct
            for one in rest
        }
    if sentences:
        sentences.append(
            f"Better and worse: p of a paired t-test over the seeds that both methods have is below "
            f"{contrasts.SIGNIFICANT} after Holm's correction for the methods of the sentence."
        )
    return [*sentences, *same]


def _budget_sentence(results: Results) -> str:
    experiment = results.experiment
    begun = [result for result in results.all if result.finals] or results.all
    tries = span(len(result.tuning) for result in begun)
    seeds = span(len(result.group.seeds) for result in begun)
    tuned = (
        "The settings were given, not tuned."
        if tries == "1"
        else f"For each method the best of {tries} settings was chosen by its validation loss, with seed "
        f"{experiment.tuning_seed}."
    )
    runs = "1 run" if seeds == "1" else f"{seeds} runs"
    return f"All methods were trained on the same data for the same number of steps. {tuned} Each has {runs}."


def _versions_of_runs(results: Results) -> str:
    versions: dict[str, dict[str, None]] = {}
    for record in results.records().values():
        for name, version in record.versions.items():
            versions.setdefault(name, {})[version] = None
    return "Versions: " + "; ".join(f"{name} {', '.join(values)}" for name, values in versions.items()) + "."


def provenance(results: Results) -> Iterator[str]:
    """How many cells have a provenance, and which do not."""
    records = results.records()
    silent = [key for key, record in records.items() if not record.has_provenance]
    if silent:
        yield (
            f"**{len(silent)} of {len(records)} cells have no digests of their experiment file and data:** "
            "their records are older."
        )
        yield f"They are {'; '.join(silent)}."
    else:
        changed = sum("with changes" in record.versions.get("commit", "") for record in records.values())
        but = f" {changed} ran from a commit with changes." if changed else ""
        yield f"All {len(records)} cells record their experiment file, commit and data.{but}"


def _tuning(results: Results) -> Table:
    def settings(point: str, flags: Sequence[str]) -> str:
        """The point of the grid; the learning rate, for a method without a grid."""
        return point or (f"lr={flags[flags.index('--lr') + 1]}" if "--lr" in flags[:-1] else "")

    return Table(
        "Settings that were tried",
        ("model", "task", "method", "settings", "seed", "validation loss", "chosen"),
        tuple(
            (
                *(result.model, result.task, result.method),
                settings(cell.point, cell.flags),
                str(cell.seed),
                format_number(record.validation_loss) if record and record.is_trained else "failed" if record else "–",
                "yes" if result.finals and cell.settings == result.chosen[0].settings else "",
            )
            for result in results.all
            for cell, record in result.tuning
        ),
        text_columns=4,
    )


def _common_flags(results: Results) -> Table:
    experiment = results.experiment
    return Table(
        "Flags that all methods share",
        ("model", "task", "flags"),
        tuple(
            (model.name, task.name, " ".join(command_line(experiment.budget(model, task))))
            for model in experiment.models
            for task in experiment.tasks
        ),
        text_columns=3,
    )


# The paper's own numbers, as printed, and ours beside them. None was measured here; paper.json has their source.

METHODS = {"full": "Full FT", "lora": "LoRA", "boft": "BOFT", "lora-ga": "LoRA-GA", "urnn": "uRNN", "hybrid": "Hybrid"}


@cache
def facts() -> Mapping[str, Any]:
    """The file: source, units by benchmark, tables."""
    return json.loads(Path(__file__).with_name("paper.json").read_text(encoding="utf-8"))


def papers_tables() -> list[Table]:
    """Table I, its averages that are not the mean of their runs, and what the text says on figures 1 and 2."""
    return [Table(**table) for table in facts()["tables"]]


def papers_models() -> Sequence[str]:
    """The models of Table I."""
    return papers_tables()[0].columns[2:]


def printed_averages() -> dict[tuple[str, str, str], str]:
    """(benchmark, method, model) -> the average that Table I prints."""
    rows, benchmark, printed = papers_tables()[0].rows, "", {}
    for (heading, method, *_), (_, _, *of_models) in zip(rows[::2], rows[1::2], strict=True):
        benchmark = heading.partition(",")[0] or benchmark
        printed |= {(benchmark, method, model): mean for model, mean in zip(papers_models(), of_models, strict=True)}
    return printed


def check_names(results: Results) -> None:
    """Raises ConfigurationError for a `paper:` in the experiment's file that is not in the paper's Table I."""
    experiment = results.experiment
    known = {
        "models": (experiment.models, papers_models()),
        "tasks": (experiment.tasks, list(facts()["units"])),
        "methods": (experiment.methods, list(METHODS.values())),
    }
    problems = [
        f"{kind}.{choice.name}.paper is {choice.paper!r}; the paper has {', '.join(names)}."
        for kind, (choices, names) in known.items()
        for choice in choices
        if choice.paper is not None and choice.paper not in names
    ]
    if problems:
        raise ConfigurationError(*problems)


def beside_ours(rows: Sequence[Row]) -> Iterator[Table]:
    """Our means of the first score of each task that has a benchmark of the paper, and the paper's averages."""
    of_tasks: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        task = row.result.group.task
        benchmark = task.paper or task.name
        if benchmark in facts()["units"] and task.score and row.metric == next(iter(task.score.metrics)):
            of_tasks.setdefault((task.name, row.metric, benchmark), []).append(row)
    for (task, metric, benchmark), ours in of_tasks.items():
        our_models = list(dict.fromkeys(row.result.model for row in ours))
        means = {(row.result.method, row.result.model): format_number(row.mean) for row in ours}
        papers_methods = {
            row.result.method: row.result.group.method.paper or METHODS.get(row.result.method) for row in ours
        }
        yield Table(
            f"Ours, {task} ({metric}), beside the paper's averages of {benchmark} ({facts()['units'][benchmark]})",
            ("method", *(f"ours: {model}" for model in our_models), *(f"paper: {model}" for model in papers_models())),
            tuple(
                (
                    method,
                    *(means.get((method, model), "–") for model in our_models),
                    *(printed_averages().get((benchmark, papers or "", model), "–") for model in papers_models()),
                )
                for method, papers in papers_methods.items()
            ),
        )
