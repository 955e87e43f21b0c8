"""The report of an experiment: the result in one chart and one table, then what stands behind it."""

from collections.abc import Iterator, Sequence
from itertools import groupby

from matplotlib.figure import Figure

from megatron_peft.experiment import paper, plots
from megatron_peft.experiment.cells import command_line
from megatron_peft.experiment.page import Report, Section
from megatron_peft.experiment.paper_tables import beside_ours, dynamics, resources, table1, wrong_averages_table
from megatron_peft.experiment.record import has_provenance
from megatron_peft.experiment.results import Result, Results
from megatron_peft.experiment.spec import Experiment, budget, grid_size
from megatron_peft.experiment.tables import (
    Row,
    Table,
    by_score,
    format_number,
    in_the_papers_form,
    rows,
    speed_table,
    with_spread,
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


def budget_sentence(results: Results) -> str:
    """What all methods have in common."""
    experiment = results.experiment
    tries, seeds = grid_size(experiment.methods[0]), len(experiment.seeds)
    tuned = (
        "The settings were given, not tuned."
        if tries == 1
        else f"For each method the best of {tries} settings was chosen by its validation loss, with seed "
        f"{experiment.tuning_seed}."
    )
    runs = "1 run" if seeds == 1 else f"{seeds} runs"
    return f"All methods were trained on the same data for the same number of steps. {tuned} Each has {runs}."


def common_flags(results: Results) -> Table:
    """The flags that all methods share, for each model and task."""
    experiment = results.experiment
    return Table(
        "Flags that all methods share",
        ("model", "task", "flags"),
        tuple(
            (model.name, task.name, " ".join(command_line(budget(experiment, model, task))))
            for model in experiment.models
            for task in experiment.tasks
        ),
        text_columns=3,
    )


def verdicts(rows: Sequence[Row], reference: str) -> list[str]:
    """A sentence for each model, task and metric: the best method, and where the reference method is."""
    places = groupby(rows, lambda row: (row.result.model, row.result.task, row.metric))
    several = len({row.result.model for row in rows}) > 1
    return [
        sentence
        for (model, task, metric), group in places
        for sentence in _verdict(f"{task} with {model}" if several else task, metric, list(group), reference)
    ]


def _verdict(place: str, metric: str, rows: Sequence[Row], reference: str) -> Iterator[str]:
    have = [row for row in rows if row.mean is not None]
    best = next((row for row in have if row.is_best), None)
    if best is None:
        return
    so_far = "So far, on" if any(run is None for row in rows for run in row.runs) else "On"
    sentence = (
        f"{so_far} {place}, **{best.result.method}** has the best {metric} of {len(have)} methods: {_mean(best)}."
    )
    own = next((row for row in have if row.result.method == reference), None)
    if own is not None and own is not best:
        ahead = [row for row in have if _is_ahead(row, own, best)]
        sentence += f" {reference}, with {_mean(own)}, comes after {', '.join(row.result.method for row in ahead)}."
    yield sentence


def _mean(row: Row) -> str:
    return with_spread(row.mean, row.deviation)


def _is_ahead(row: Row, own: Row, best: Row) -> bool:
    """Whether the row is better than `own`, in the direction of the best method."""
    assert row.mean is not None and own.mean is not None and best.mean is not None
    return row.mean > own.mean if best.mean > own.mean else row.mean < own.mean


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


def build_report(results: Results, reference: str) -> Report:
    """Args: reference: the method that the others are tested against."""
    found = rows(results, reference)
    ours = in_the_papers_form(results, found)
    long = with_test(found, reference, len(results.experiment.seeds))
    return Report(
        results.experiment.title,
        tuple(_sections(results, found, reference, ours, long)),
        {"table1.csv": long.csv(), "table1.tex": ours.latex(), "table1-tested.tex": long.latex()},
    )


def asks_for_the_paper(experiment: Experiment) -> bool:
    """Whether the file names something of the paper's to show beside its results."""
    choices = (*experiment.models, *experiment.tasks, *experiment.methods)
    return any(choice.paper is not None for choice in choices)


def _sections(results: Results, found: Sequence[Row], reference: str, ours: Table, long: Table) -> Iterator[Section]:
    headline = {"result": plots.draw_results(found)}
    texts = [state(results), *verdicts(found, reference), budget_sentence(results)]
    yield Section("Result", texts, [by_score(results, found)], headline)
    yield Section("Validation loss and gradient norm", figures=_dynamics_figures(results))
    yield Section("Cost", tables=[plots.cost_table(results)], figures=_cost_figures(results))
    speeds = [table for place in results.places() if (table := speed_table(results, *place))]
    if speeds:
        yield Section("Steps to LoRA's loss", tables=speeds)
    lambdas = _lambda_figures(results)
    if lambdas:
        yield Section("Lambda by layer", ["Means over the final runs."], figures=lambdas)
    yield Section("All runs and tests", tables=[long], is_folded=True)
    if asks_for_the_paper(results.experiment):
        yield from _paper_sections(found, ours)
    made = [versions_of_runs(results), *provenance(results)]
    yield Section("How it was made", made, [tuning(results), common_flags(results)], is_folded=True)


def _paper_sections(found: Sequence[Row], ours: Table) -> Iterator[Section]:
    note = "Other models and other data: what can be compared is the order of the methods."
    yield Section("Table I, in the paper's form", [note], [ours, *beside_ours(found)], is_folded=True)
    source = f"Source: {paper.facts()['source']}."
    tables = [table1(), wrong_averages_table(), resources(), dynamics()]
    yield Section("The paper's own numbers", [source], tables, is_papers=True, is_folded=True)


def _cost_figures(results: Results) -> dict[str, Figure]:
    return {f"cost-{task}": plots.draw_cost(results, task) for task in dict.fromkeys(t for _, t in results.places())}


def _dynamics_figures(results: Results) -> dict[str, Figure]:
    return {f"curves-{model}-{task}": plots.draw_dynamics(results, model, task) for model, task in results.places()}


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
