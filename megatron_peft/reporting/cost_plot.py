"""Figure 1: time per epoch and peak memory of each method, by model."""

from collections.abc import Callable, Sequence
from statistics import mean

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_peft.experiment.record import CellRecord
from megatron_peft.experiment.results import Result, Results
from megatron_peft.reporting.drawing import colour, new_figure, style
from megatron_peft.reporting.table import Table, number

Measure = Callable[[CellRecord], float | None]


def epoch_minutes(record: CellRecord) -> float | None:
    return record.epoch_seconds and record.epoch_seconds / 60


def peak_gigabytes(record: CellRecord) -> float | None:
    return record.peak_memory_bytes and record.peak_memory_bytes / 1e9


def mean_of(result: Result, measure: Measure) -> float | None:
    """Over the final runs that were measured."""
    found = [value for record in result.finals.values() if (value := measure(record)) is not None]
    return mean(found) if found else None


def draw(results: Results, task: str) -> Figure:
    """Bars of each method, one a model; whiskers are the least and the greatest of the runs."""
    shown = [result for result in results.all if result.task == task and result.finals]
    models = list(dict.fromkeys(result.model for result in shown))
    methods = list(dict.fromkeys(result.method for result in shown))
    figure = new_figure(12, 4.2, f"Time per epoch and peak memory, {task}")
    left, right = figure.subplots(1, 2)
    for axes, title, measure in (
        (left, "Minutes per epoch", epoch_minutes),
        (right, "Peak memory of a process (GB)", peak_gigabytes),
    ):
        _draw_bars(axes, shown, models, methods, measure)
        style(axes, title)
    if len(models) > 1:
        right.legend(frameon=False)
    return figure


def _draw_bars(
    axes: Axes, shown: Sequence[Result], models: Sequence[str], methods: Sequence[str], measure: Measure
) -> None:
    width = 0.8 / len(models)
    for result in shown:
        found = [value for record in result.finals.values() if (value := measure(record)) is not None]
        if not found:
            continue
        group = models.index(result.model)
        at = methods.index(result.method) - 0.4 + width * (group + 0.5)
        label = result.model if result.method == methods[0] else None
        height = mean(found)
        whiskers = [[height - min(found)], [max(found) - height]]
        axes.bar(at, height, width * 0.9, yerr=whiskers, capsize=2, color=colour(group), label=label)
    axes.set_xticks(range(len(methods)), methods, rotation=25, ha="right")


def table(results: Results) -> Table:
    """The numbers of the figure, with the number of trained parameters."""
    return Table(
        "Cost",
        ("model", "task", "method", "trainable parameters", "seconds a step", "minutes an epoch", "peak memory (GB)"),
        tuple(
            (
                *(result.model, result.task, result.method),
                _trainable(result),
                number(mean_of(result, lambda record: record.step_seconds)),
                number(mean_of(result, epoch_minutes)),
                number(mean_of(result, peak_gigabytes)),
            )
            for result in results.all
            if result.finals
        ),
        "Means over the final runs. Time is wall-clock time, with whatever else the machine did. Memory is that of the "
        "process that writes the log: on a GPU what its allocator held, on a CPU the resident set with Python itself.",
        text_columns=3,
    )


def _trainable(result: Result) -> str:
    found = next(iter(result.finals.values())).trainable_parameters
    return "–" if found is None else f"{found:,}"
