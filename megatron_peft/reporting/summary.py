"""The sentences of a report: the budget, who has the best mean, how the Hybrid does, where the cells came from."""

from collections.abc import Iterator, Sequence
from itertools import groupby

from megatron_peft.experiment.cells import command_line
from megatron_peft.experiment.provenance import is_told
from megatron_peft.experiment.results import Results, peft_method
from megatron_peft.experiment.spec import budget, grid_size
from megatron_peft.experiment.tables import Row
from megatron_peft.reporting.table import Table, number


def state(results: Results) -> str:
    """How much of the experiment is there."""
    have, whole = results.num_finals()
    seeds = ", ".join(map(str, results.experiment.seeds))
    told = f"{have} of {whole} final runs are there (seeds {seeds})."
    if have == whole:
        return told
    missing: dict[str, list[str]] = {}
    for result in results.all:
        if len(result.finals) < len(results.experiment.seeds):
            missing.setdefault(f"{result.model}, {result.task}", []).append(result.method)
    places = "; ".join(f"{place}: {', '.join(methods)}" for place, methods in missing.items())
    return f"**Not finished:** {told} Runs are missing of {places}."


def budgets(results: Results) -> list[str]:
    """A sentence for each task, on what all methods have in common; one for each model where models differ in it."""
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
    first = f"{place}: {so_far}{best.result.method} has the best mean of {len(have)} methods, {number(best.mean)}."
    yield f"{first} {_hybrid(have)}".rstrip()


def _hybrid(rows: Sequence[Row]) -> str:
    hybrid = next((row for row in rows if peft_method(row.result.group.method) == "hybrid"), None)
    if hybrid is None:
        return ""
    if hybrid.is_best:
        return "That is the Hybrid."
    assert hybrid.mean is not None
    ahead = [row.result.method for row in rows if row.mean is not None and _is_ahead(row, hybrid.mean, rows)]
    return (
        f"The Hybrid ({hybrid.result.method}, {number(hybrid.mean)}) does not win: "
        f"{', '.join(ahead)} {'is' if len(ahead) == 1 else 'are'} ahead of it."
    )


def _is_ahead(row: Row, mean: float, rows: Sequence[Row]) -> bool:
    """On the side of `mean` that the best method is on."""
    best = next(other.mean for other in rows if other.is_best)
    assert row.mean is not None and best is not None
    return row.mean > mean if best > mean else row.mean < mean


def tuning(results: Results) -> Table:
    """What was tried, and what came of it."""
    return Table(
        "Settings that were tried",
        ("model", "task", "method", "settings", "seed", "validation loss", "chosen"),
        tuple(
            (
                *(result.model, result.task, result.method),
                " ".join(f"{name}={value}" for name, value in cell.settings.items()) or _own_flags(cell.flags),
                str(cell.seed),
                number(record.validation_loss) if record and record.is_trained else "failed" if record else "–",
                "yes" if result.finals and dict(cell.settings) == dict(result.settings) else "",
            )
            for result in results.all
            for cell, record in result.tuning
        ),
        text_columns=4,
    )


def _own_flags(flags: Sequence[str]) -> str:
    """The learning rate, where there is no grid."""
    return f"lr={flags[flags.index('--lr') + 1]}" if "--lr" in flags[:-1] else ""


def versions(results: Results) -> str:
    """Of what the final runs ran with."""
    found: dict[str, dict[str, None]] = {}
    for result in results.all:
        for record in result.finals.values():
            for name, value in record.versions.items():
                found.setdefault(name, {})[value] = None
    return "Versions: " + "; ".join(f"{name} {', '.join(values)}" for name, values in found.items()) + "."


def provenance(results: Results) -> Iterator[str]:
    """How many cells say where they came from, which do not, and data that were not the same for all of them."""
    records = results.records()
    silent = [key for key, record in records.items() if not is_told(record)]
    if silent:
        yield (
            f"**{len(silent)} of {len(records)} cells do not say from which experiment file and data they came:** "
            "their records are older than that."
        )
        yield f"They are {'; '.join(silent)}."
    else:
        yield f"All {len(records)} cells say from which experiment file, commit and data they came."
    read: dict[str, dict[str, list[str]]] = {}
    for key, record in records.items():
        for source in record.provenance.values():
            for path, digest in source["data_sha256"].items():
                read.setdefault(path, {}).setdefault(digest, []).append(key)
    for path, keys_of in read.items():
        if len(keys_of) > 1:
            groups = "; ".join(f"{digest[:12]} by {', '.join(keys)}" for digest, keys in keys_of.items())
            yield f"**Not the same data:** {path} was read as {groups}."
