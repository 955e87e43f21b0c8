"""The report of an experiment: the result in one chart and one table, then what stands behind it."""

from collections.abc import Iterator, Sequence
from itertools import groupby

from megatron_peft.experiment import paper, plots
from megatron_peft.experiment.page import Report, Section
from megatron_peft.experiment.results import Results
from megatron_peft.experiment.spec import command_line
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


def build_report(results: Results, reference: str) -> Report:
    """Args: reference: the method that the others are tested against."""
    table_rows = rows(results, reference)
    ours = in_the_papers_form(results, table_rows)
    tested = with_test(table_rows, reference, len(results.experiment.seeds))
    return Report(
        results.experiment.title,
        tuple(_sections(results, table_rows, reference, ours, tested)),
        {"table1.csv": tested.csv(), "table1.tex": ours.latex(), "table1-tested.tex": tested.latex()},
    )


def _sections(
    results: Results, table_rows: Sequence[Row], reference: str, ours: Table, tested: Table
) -> Iterator[Section]:
    experiment, places = results.experiment, results.places()
    texts = [state(results), *verdicts(table_rows, reference), _budget_sentence(results)]
    yield Section("Result", texts, [by_score(results, table_rows)], {"result": plots.draw_results(table_rows)})
    curves = {f"curves-{model}-{task}": plots.draw_dynamics(results, model, task) for model, task in places}
    yield Section("Validation loss and gradient norm", figures=curves)
    costs = {f"cost-{task}": plots.draw_cost(results, task) for task in dict.fromkeys(task for _, task in places)}
    yield Section("Cost", tables=[plots.cost_table(results)], figures=costs)
    if speeds := [table for place in places if (table := speed_table(results, *place))]:
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
        beside = [ours, *paper.beside_ours(table_rows)]
        yield Section("Table I, in the paper's form", [note], beside, is_folded=True)
        source = f"Source: {paper.facts()['source']}."
        yield Section("The paper's own numbers", [source], paper.tables(), is_papers=True, is_folded=True)
    made = [_versions_of_runs(results), *provenance(results)]
    yield Section("How it was made", made, [_tuning(results), _common_flags(results)], is_folded=True)


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


def verdicts(rows: Sequence[Row], reference: str) -> list[str]:
    """A sentence for each model, task and metric: the best method, and where the reference method is."""
    several_models = len({row.result.model for row in rows}) > 1
    sentences = []
    for (model, task, metric), group in groupby(rows, lambda row: (row.result.model, row.result.task, row.metric)):
        of_metric = list(group)
        measured = [row for row in of_metric if row.mean is not None]
        best = next((row for row in measured if row.is_best), None)
        if best is None:
            continue
        place = f"{task} with {model}" if several_models else task
        so_far = "So far, on" if any(run is None for row in of_metric for run in row.runs) else "On"
        sentence = (
            f"{so_far} {place}, **{best.result.method}** has the best {metric} of {len(measured)} methods: "
            f"{with_spread(best.mean, best.deviation)}."
        )
        compared = next((row for row in measured if row.result.method == reference), None)
        if compared is not None and compared is not best:
            sign = 1 if (best.mean or 0.0) > (compared.mean or 0.0) else -1  # whether higher is better
            ahead = [row.result.method for row in measured if sign * (row.mean or 0.0) > sign * (compared.mean or 0.0)]
            with_mean = with_spread(compared.mean, compared.deviation)
            sentence += f" {reference}, with {with_mean}, comes after {', '.join(ahead)}."
        sentences.append(sentence)
    return sentences


def _budget_sentence(results: Results) -> str:
    """What all methods have in common."""
    experiment = results.experiment
    tries, seeds = experiment.methods[0].num_points, len(experiment.seeds)
    tuned = (
        "The settings were given, not tuned."
        if tries == 1
        else f"For each method the best of {tries} settings was chosen by its validation loss, with seed "
        f"{experiment.tuning_seed}."
    )
    runs = "1 run" if seeds == 1 else f"{seeds} runs"
    return f"All methods were trained on the same data for the same number of steps. {tuned} Each has {runs}."


def _versions_of_runs(results: Results) -> str:
    """The versions of the final runs."""
    versions: dict[str, dict[str, None]] = {}
    for result in results.all:
        for record in result.finals.values():
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
        yield f"All {len(records)} cells record their experiment file, commit and data."


def _tuning(results: Results) -> Table:
    """The settings that were tried, and their validation losses."""

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
                "yes" if result.finals and at == result.best else "",
            )
            for result in results.all
            for at, (cell, record) in enumerate(result.tuning)
        ),
        text_columns=4,
    )


def _common_flags(results: Results) -> Table:
    """The flags that all methods share, for each model and task."""
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
