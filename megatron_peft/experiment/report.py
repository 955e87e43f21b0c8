"""Reports as sections of text, tables and figures, written as one self-contained HTML page or as Markdown; that of an
experiment: the result in one chart and one table, then what stands behind it.
"""

import base64
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader
from matplotlib.figure import Figure

from megatron_peft.checkpoint.folders import write_atomically
from megatron_peft.config import ConfigurationError
from megatron_peft.experiment import contrasts, plots, tables
from megatron_peft.experiment.results import Result, Results, metrics, same_runs
from megatron_peft.experiment.spec import span
from megatron_peft.experiment.tables import Scores, Table, format_number, make_table

PAGE = "page.html.jinja"
MARKDOWN, HTML = "report.md", "report.html"
SUMMARIZED = ("Result", "Loss", "Speed and memory")  # sections of an experiment, and of a run


@dataclass(frozen=True)
class Section:
    """A heading and its content: figures by the names of their files, texts, then tables.

    is_papers: it shows the paper's numbers, which were not measured here.
    is_folded: the page shows the heading only, until it is clicked.
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
    """Return the report as Markdown; its figures are files beside it."""
    parts = [f"# {report.title}"]
    for section in report.sections:
        parts += [f"## {section.title}", *(f"![{name}]({name}.svg)" for name in section.figures), *section.texts]
        parts += [table.markdown().rstrip() for table in section.tables]
    return "\n\n".join(parts) + "\n"


def html(report: Report) -> str:
    """Return one page that contains its plots, style and script."""
    environment = Environment(loader=PackageLoader("megatron_peft.experiment", "."), autoescape=True, trim_blocks=True)
    environment.filters["svg_base64"] = lambda figure: base64.b64encode(plots.svg(figure).encode()).decode()
    environment.filters["plain"] = plain
    return environment.get_template(PAGE).render(report=report)


def plain(text: str) -> str:
    """Return a text without Markdown's marks."""
    return text.replace("**", "").replace("`", "")


def summary(report: Report) -> str:
    """Return the texts and tables of the sections in `SUMMARIZED`, for a terminal."""
    sections = [section for section in report.sections if section.title in SUMMARIZED]
    texts = "\n".join(plain(text) for section in sections for text in section.texts)
    return "\n\n".join([texts, *(plain(table.markdown()).rstrip() for section in sections for table in section.tables)])


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
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, html(report))
    return path


# The report of an experiment.


def build_report(results: Results, reference: str) -> Report:
    """Args: reference: the method that the others are tested against.

    Raises ConfigurationError for a `paper:` in the experiment's file that is not in the paper's Table I.
    """
    check_names(results)
    scores = tables.score_runs(results, reference)
    ours, tested = tables.in_the_papers_form(results, scores), tables.with_test(results, scores, reference)
    sections = tuple(_sections(results, scores, reference, ours, tested))
    files = {"table1.csv": tested.csv(), "table1.tex": ours.latex(), "table1-tested.tex": tested.latex()}
    return Report(results.experiment.title, sections, files)


def _sections(results: Results, scores: Scores, reference: str, ours: Table, tested: Table) -> Iterator[Section]:
    experiment, places, answers = results.experiment, results.places(), contrasts.answers(results)
    texts = [state(results), *contrasts.sentences(results, answers), *not_tuned(results)]
    texts += [*verdicts(results, scores, reference), _budget_sentence(results)]
    yield Section("Result", texts, [tables.by_score(results, scores)], {"result": plots.draw_results(results, scores)})
    if answers:
        yield Section("Contrasts", tables=[tables.contrast_table(answers)])
    curves = {f"curves-{model}-{task}": plots.draw_dynamics(results, model, task) for model, task in places}
    depths = {f"depth-{model}-{task}": plots.draw_depths(results, model, task) for model, task in places}
    curves |= {name: figure for name, figure in depths.items() if figure}
    yield Section("Validation loss and gradient norm", figures=curves)
    figures = {f"cost-{task}": plots.draw_cost(results, task) for task in dict.fromkeys(task for _, task in places)}
    yield Section("Cost", tables=[tables.cost_table(results)], figures=figures)
    if speeds := [table for place in places if (table := tables.speed_table(results, *place))]:
        yield Section("Steps to LoRA's loss", tables=speeds)
    lambdas = {
        f"lambda-{result.model}-{result.task}-{result.method}": plots.draw_mean_lambdas(result)
        for result in results.all
        if any(record.lambdas.by_layer for record in result.finals.values())
    }
    if lambdas:
        yield Section("Lambda by layer", ["Means over the final runs."], figures=lambdas)
    yield Section("All runs and tests", tables=[tested], is_folded=True)
    choices = (*experiment.models, *experiment.tasks, *experiment.methods)
    if any(choice.paper is not None for choice in choices):
        note = "Other models and other data: what can be compared is the order of the methods."
        beside = [ours, *beside_ours(results, scores)]
        yield Section("Table I, in the paper's form", [note], beside, is_folded=True)
        source = f"Source: {facts()['source']}."
        yield Section("The paper's own numbers", [source], papers_tables(), is_papers=True, is_folded=True)
    made = [_versions_of_runs(results), provenance(results)]
    settings = [tables.tuning_table(results), tables.flags_table(results)]
    yield Section("How it was made", made, settings, is_folded=True)


def state(results: Results) -> str:
    """Return how many final runs are finished."""
    seeds = results.experiment.all_seeds
    num_done = sum(len(result.finals) for result in results.all)
    num_wanted = sum(len(result.group.seeds) for result in results.all)
    done = f"{num_done} of {num_wanted} final runs are in (seeds {', '.join(map(str, seeds))})."
    missing = [result for result in results.all if len(result.finals) < len(result.group.seeds)]
    return f"**Not finished:** {done} Missing runs: {_by_place(missing)}." if missing else done


def _by_place(results: Sequence[Result]) -> str:
    methods: dict[str, list[str]] = {}
    for result in results:
        methods.setdefault(f"{result.model}, {result.task}", []).append(result.method)
    return "; ".join(f"{place}: {', '.join(names)}" for place, names in methods.items())


def not_tuned(results: Results) -> Iterator[str]:
    """Yield a sentence for each reason, with the methods that are not tuned for it."""
    begun = [result for result in results.all if result.chosen]
    for reason in dict.fromkeys(result.why_not_tuned for result in begun if result.why_not_tuned):
        untuned = [result for result in begun if result.why_not_tuned == reason]
        yield f"**Not tuned,** since {reason}: {_by_place(untuned)}."


def verdicts(results: Results, scores: Scores, reference: str) -> list[str]:
    """Return a sentence for each model, task and metric: which methods are better and worse than the reference.

    Each is compared with it over the seeds that both have, as in the table of tests. Methods with the same runs count
    once.
    """
    sentences, same = [], dict[str, None]()
    for (model, task, metric), part in scores.items():
        of_place = results.of(model, task)
        known = [one for one in of_place if pd.notna(part["mean"][one.method])]
        distinct = [[one.method for one in each] for each in same_runs(known)]
        others = [first for first, *rest in distinct if reference not in (first, *rest)]
        if reference not in {one.method for one in known} or not others:
            continue
        methods: dict[str, list[str]] = {"better": [], "worse": [], "undecided": []}
        higher = metrics(of_place[0].group.task)[metric]
        for name, p in zip(others, contrasts.holm(part["p"][others].fillna(1.0)), strict=True):
            is_better = (part["difference"][name] > 0) == higher
            word = ("better" if is_better else "worse") if p < contrasts.SIGNIFICANT else "undecided"
            methods[word].append(name)
        listed = "; ".join(f"**{word}** {', '.join(names)}" for word, names in methods.items() if names)
        is_whole = all(one.values(metric).keys() >= one.seeds_of(metric) for one in of_place)
        place = f"{task} with {model}" if len({place[0] for place in results.places()}) > 1 else task
        sentences.append(f"{'On' if is_whole else 'So far, on'} {place}, {metric} against {reference}: {listed}.")
        for first, *rest in distinct:
            same |= {f"On {place}, {one} has the same runs as {first}: they count once.": None for one in rest}
    if sentences:
        sentences.append(
            f"Better and worse: p of a paired t-test over the seeds that both methods have is below "
            f"{contrasts.SIGNIFICANT} after Holm's correction for the methods of the sentence."
        )
    return [*sentences, *same]


def _budget_sentence(results: Results) -> str:
    begun = [result for result in results.all if result.finals] or results.all
    tries = span(len(result.tuning) for result in begun)
    seeds = span(len(result.group.seeds) for result in begun)
    tuned = (
        "The settings were given, not tuned."
        if tries == "1"
        else f"For each method the best of {tries} settings was chosen by its validation loss, with seed "
        f"{results.experiment.tuning_seed}."
    )
    runs = "1 run" if seeds == "1" else f"{seeds} runs"
    return f"All methods were trained on the same data for the same number of steps. {tuned} Each has {runs}."


def _versions_of_runs(results: Results) -> str:
    versions: dict[str, dict[str, None]] = {}
    for record in results.records().values():
        for name, version in record.versions.items():
            versions.setdefault(name, {})[version] = None
    return "Versions: " + "; ".join(f"{name} {', '.join(values)}" for name, values in versions.items()) + "."


def provenance(results: Results) -> str:
    """Return how many cells record their commit and data, and which do not."""
    records = results.records()
    if silent := [key for key, record in records.items() if "commit" not in record.versions]:
        return f"**{len(silent)} of {len(records)} cells do not record their commit:** {'; '.join(silent)}."
    changed = sum("with changes" in record.versions["commit"] for record in records.values())
    but = f" {changed} ran from a commit with changes." if changed else ""
    return f"All {len(records)} cells record their commit and data.{but}"


# The paper's own numbers, as printed, and ours beside them. None was measured here; paper.json has their source.

METHODS = {"full": "Full FT", "lora": "LoRA", "boft": "BOFT", "lora-ga": "LoRA-GA", "urnn": "uRNN", "hybrid": "Hybrid"}


@cache
def facts() -> Mapping[str, Any]:
    """Return the content of the file: source, units by benchmark, tables."""
    return json.loads(Path(__file__).with_name("paper.json").read_text(encoding="utf-8"))


def papers_tables() -> list[Table]:
    """Return Table I, its averages that are not the mean of their runs, and what the text says on figures 1 and 2."""
    return [make_table(**table) for table in facts()["tables"]]


def printed_averages() -> pd.DataFrame:
    """Return the averages that Table I prints: a row for (benchmark, method), a column for each model."""
    printed = papers_tables()[0].frame
    runs, averages = printed[::2], printed[1::2].iloc[:, 2:]
    benchmarks = runs["Benchmark"].str.partition(",")[0].replace("", None).ffill()
    return averages.set_index(pd.MultiIndex.from_arrays([benchmarks, runs["Method"]]))


def check_names(results: Results) -> None:
    """Raises ConfigurationError for a `paper:` in the experiment's file that is not in the paper's Table I."""
    experiment = results.experiment
    known = {
        "models": (experiment.models, [*printed_averages().columns]),
        "tasks": (experiment.tasks, [*facts()["units"]]),
        "methods": (experiment.methods, [*METHODS.values()]),
    }
    if problems := [
        f"{kind}.{choice.name}.paper is {choice.paper!r}; the paper has {', '.join(names)}."
        for kind, (choices, names) in known.items()
        for choice in choices
        if choice.paper is not None and choice.paper not in names
    ]:
        raise ConfigurationError(*problems)


def beside_ours(results: Results, scores: Scores) -> Iterator[Table]:
    """Yield our means of the first score of each task that has a benchmark of the paper, and the paper's averages."""
    names = {method.name: method.paper or METHODS.get(method.name, "") for method in results.experiment.methods}
    for task in results.experiment.tasks:
        benchmark, metric = task.paper or task.name, next(iter(task.score.metrics)) if task.score else ""
        means = {
            key[0]: part["mean"].map(format_number) for key, part in scores.items() if key[1:] == (task.name, metric)
        }
        if benchmark not in facts()["units"] or not means:
            continue
        ours = pd.DataFrame(means).fillna(tables.NONE).add_prefix("ours: ")
        papers = printed_averages().loc[benchmark].reindex([names[name] for name in ours.index]).fillna(tables.NONE)
        frame = pd.concat([ours, papers.set_axis(ours.index).add_prefix("paper: ")], axis=1)
        yield Table(
            f"Ours, {task.name} ({metric}), beside the paper's averages of {benchmark} ({facts()['units'][benchmark]})",
            frame.rename_axis("method").reset_index(),
        )
