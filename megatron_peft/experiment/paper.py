"""The paper's own numbers, as printed, and ours beside them. None was measured here; paper.json has their source."""

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from megatron_peft.config import ConfigurationError
from megatron_peft.experiment.results import Results
from megatron_peft.experiment.tables import Row, Table, format_number

FILE = Path(__file__).with_name("paper.json")
METHODS = {"full": "Full FT", "lora": "LoRA", "boft": "BOFT", "lora-ga": "LoRA-GA", "urnn": "uRNN", "hybrid": "Hybrid"}


@cache
def facts() -> Mapping[str, Any]:
    """The file: source, units by benchmark, tables."""
    return json.loads(FILE.read_text(encoding="utf-8"))


def tables() -> list[Table]:
    """Table I, its averages that are not the mean of their runs, and what the text says on figures 1 and 2."""
    return [
        Table(**{**table, "columns": tuple(table["columns"]), "rows": tuple(map(tuple, table["rows"]))})
        for table in facts()["tables"]
    ]


def models() -> Sequence[str]:
    """The models of Table I."""
    return tables()[0].columns[2:]


def printed_averages() -> dict[tuple[str, str, str], str]:
    """(benchmark, method, model) -> the average that Table I prints."""
    rows, benchmark, printed = tables()[0].rows, "", {}
    for (heading, method, *_), (_, _, *of_models) in zip(rows[::2], rows[1::2], strict=True):
        benchmark = heading.partition(",")[0] or benchmark
        printed |= {(benchmark, method, model): mean for model, mean in zip(models(), of_models, strict=True)}
    return printed


def check_names(results: Results) -> None:
    """Raises ConfigurationError for a `paper:` in the experiment's file that is not in the paper's Table I."""
    experiment = results.experiment
    known = {
        "models": (experiment.models, models()),
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
            ("method", *(f"ours: {model}" for model in our_models), *(f"paper: {model}" for model in models())),
            tuple(
                (
                    method,
                    *(means.get((method, model), "–") for model in our_models),
                    *(printed_averages().get((benchmark, papers or "", model), "–") for model in models()),
                )
                for method, papers in papers_methods.items()
            ),
        )
