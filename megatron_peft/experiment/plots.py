"""The figures of an experiment's report: scores, costs, curves of training, lambda of each layer; what plots share."""

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import MaxNLocator

from megatron_peft.checkpoint.folders import write_atomically
from megatron_peft.experiment.results import Result, Results, metrics, same_runs, shown_metrics
from megatron_peft.experiment.tables import Scores, costs, format_number, is_quiet

# What the plots have in common: a figure without a display, the look of its axes, and its files.

GUIDE, INK = "#d0d7de", "#24292f"
BEFORE, AFTER = "#9aa5b1", "#1f6feb"
COLOURS = ("#1f6feb", "#d1242f", "#1a7f37", "#9a6700", "#8250df", "#0a7f8c", "#bf3989", "#57606a", "#e16f24", "#24292f")


def new_figure(width: float, height: float, title: str = "") -> Figure:
    """Sizes in inches."""
    figure = Figure(figsize=(width, height), facecolor="white")
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.1)
    FigureCanvasAgg(figure)
    if title:
        figure.suptitle(title, fontsize=12, fontweight="bold")
    return figure


def style(axes: Axes, title: str, across: str = "") -> None:
    """Title, grid and frame that all plots have. Args: across: what the horizontal axis counts."""
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel(across)
    axes.grid(axis="y", color=GUIDE, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def color(position: int) -> str:
    """The color of the curve or bar at this position."""
    return COLOURS[position % len(COLOURS)]


def marker(values: Sequence[float] | np.ndarray) -> str:
    """The marker of a curve: no line would be seen of a single point."""
    return "o" if len(values) == 1 else ""


def measurement_format(values: Sequence[float]) -> str:
    """Return matplotlib's format of a few measurements. Two points are not connected: a line would suggest a curve."""
    return "o" if len(values) < 3 else "o-"


def svg(figure: Figure) -> str:
    """Return the SVG of a figure, the same text at any time.

    Strict renderers refuse matplotlib's DOCTYPE, which names an external DTD, and sizes in points.
    """
    output = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "megatron-peft"}):
        figure.savefig(output, format="svg", metadata={"Date": None})
    text = re.sub(r"<!DOCTYPE[^>]*>\s*", "", output.getvalue(), count=1)
    return re.sub(r'="([\d.]+)pt"', lambda points: f'="{float(points[1]) * 4 / 3:g}"', text, count=2)


def save(figure: Figure, folder: Path, name: str) -> None:
    """NAME.png and NAME.svg, each whole or not at all."""
    write_atomically(folder / f"{name}.svg", svg(figure))
    save_png(figure, folder / f"{name}.png")


def save_png(figure: Figure, path: Path) -> None:
    """A picture of pixels, whole or not at all."""
    output = io.BytesIO()
    figure.savefig(output, format="png", dpi=120)
    write_atomically(path, output.getvalue())


# The headline: the first score of each task, a dot for each run.


def draw_results(results: Results, scores: Scores) -> Figure:
    """Draw a panel for each model and task: the runs of each method, and a line at their mean; the best is colored."""
    places = results.places()
    across, down = max(min(len(places), 3), 1), max(-(-len(places) // 3), 1)  # one is empty before the first final run
    figure = new_figure(4.2 * across if across > 1 else 6.5, 3.4 * down)
    grid = figure.subplots(down, across, squeeze=False).flat
    for axes, (model, task) in zip(grid, places, strict=False):
        choice = results.of(model, task)[0].group.task
        metric = shown_metrics(choice)[0]
        part = scores[model, task, metric]
        for at, (_, row) in enumerate(part.iterrows()):
            runs, shade = row[list(results.experiment.all_seeds)].dropna(), AFTER if row["is_best"] else BEFORE
            axes.plot([at] * len(runs), runs, "o", color=shade, markersize=6, alpha=0.7, markeredgewidth=0)
            if len(runs):
                axes.hlines(row["mean"], at - 0.3, at + 0.3, color=shade, linewidth=2)
                axes.annotate(format_number(row["mean"]), (at + 0.33, row["mean"]), va="center", fontsize=8, color=INK)
        axes.set_xticks(range(len(part)), part.index, rotation=25, ha="right")
        axes.set_xlim(-0.6, len(part) - 0.1)
        axes.margins(y=0.12)
        place = f"{task}, {model}" if len({place[0] for place in places}) > 1 else task
        style(axes, f"{place}: {metric} ({'higher' if metrics(choice)[metric] else 'lower'} is better)")
    for axes in grid[len(places) :]:
        axes.set_visible(False)
    return figure


def draw_cost(results: Results, task: str) -> Figure:
    """Draw time and peak memory: a bar of each method for each model; whiskers are the least and the greatest run."""
    runs = costs(results)
    time = "minutes an epoch" if is_quiet(runs) else "CPU minutes a run"
    titles = {"minutes an epoch": "Minutes per epoch", "CPU minutes a run": "CPU minutes of a run"}
    titles["peak memory (GB)"] = "Peak memory of a process (GB)"
    runs = runs.xs(task, level="task").groupby(["method", "model"], sort=False)
    figure = new_figure(12, 4.2, f"Time and peak memory, {task}")
    panels = figure.subplots(1, 2)
    for axes, column in zip(panels, (time, "peak memory (GB)"), strict=True):
        means, low, high = (runs[column].agg(name).unstack("model", sort=False) for name in ("mean", "min", "max"))
        errors = np.stack([means - low, high - means]).transpose(2, 0, 1)  # [models, 2, methods]
        colors = [color(at) for at in range(len(means.columns))]
        means.plot.bar(ax=axes, yerr=errors, capsize=2, width=0.72, color=colors, legend=False, xlabel="")
        axes.set_xticks(range(len(means)), means.index, rotation=25, ha="right")
        style(axes, titles[column])
    if len(panels[1].containers) > 2:
        panels[1].legend(frameon=False)
    return figure


# Gradient norm and validation loss of each method, by epoch.

MAX_POINTS = 20  # of a curve of gradient norms: each is the mean over its part of the run


def draw_dynamics(results: Results, model: str, task: str) -> Figure:
    """Draw a line for each method, the mean over its seeds; the band is from the least to the greatest of them."""
    figure = new_figure(12, 4.6, f"{model}, {task}")
    left, right = figure.subplots(1, 2)
    for axes, name, title in ((left, "validation_loss", "Validation loss"), (right, "grad_norm", "Gradient norm")):
        for at, same in enumerate(same_runs(results.of(model, task))):
            curves = [record.curves[name] for record in same[0].finals.values() if record.curves.get(name)]
            if not curves:
                continue
            averaged = [averages(curve, MAX_POINTS) for curve in curves]
            length = min(map(len, averaged))
            values = np.stack([curve[:length, 1] for curve in averaged])
            epochs, means, label = averaged[0][:length, 0], values.mean(axis=0), ", ".join(one.method for one in same)
            axes.plot(epochs, means, color=color(at), linewidth=1.6, label=label, marker=marker(means))
            if len(values) > 1:
                axes.fill_between(epochs, values.min(0), values.max(0), color=color(at), alpha=0.15, linewidth=0)
        style(axes, title, "epoch")
    right.set_ylim(bottom=0)
    left.legend(*right.get_legend_handles_labels(), frameon=False, fontsize=8)
    return figure


def averages(curve: Sequence[Sequence[float]], most: int) -> np.ndarray:
    """Return [points, 2] epochs and values of a record's curve: means over `most` parts of about as many points."""
    points = np.array(curve)[:, 1:]
    return np.array([part.mean(axis=0) for part in np.array_split(points, min(most, len(points)))])


def draw_depths(results: Results, model: str, task: str) -> Figure | None:
    """Draw the gradient norm of each layer, a line for each method: the mean over its runs and their iterations."""
    figure = new_figure(10, 3.4, f"{model}, {task}")
    axes = figure.subplots()
    for at, same in enumerate(same_runs(results.of(model, task))):
        if runs := [record.grad_norms.by_layer for record in same[0].finals.values() if record.grad_norms.by_layer]:
            of_runs = [[np.mean(np.array(norms, dtype=float)) for norms in run.values()] for run in runs]
            label = ", ".join(one.method for one in same)
            axes.plot(np.mean(of_runs, axis=0), color=color(at), linewidth=1.6, label=label)
    if not axes.lines:
        return None
    style(axes, "Gradient norm by layer, before clipping", "layer")
    axes.set_yscale("log")
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


# The Hybrid's lambda: a heat map of layer by step for each kind of linear layer.
#
# lambda is the share of the low-rank part, 1 - lambda that of the rotation.

LAYER = re.compile(r"decoder\.layers\.(\d+)\.(?:.*\.)?(\w+)$")
ByLayer = Mapping[str, Sequence[float | None]]


def read_lines(records: Sequence[Mapping[str, Any]]) -> tuple[list[int], dict[str, list[float | None]]]:
    """(iterations, values by layer) of the lines of lambda.jsonl."""
    layers = records[-1]["lambda"] if records else {}
    return (
        [record["iteration"] for record in records],
        {layer: [record["lambda"].get(layer) for record in records] for layer in layers},
    )


def maps(by_layer: ByLayer) -> dict[str, np.ndarray]:
    """Kind of linear layer, as linear_qkv -> [layers, iterations]; layers that are not adapted are NaN."""
    kinds: dict[str, dict[int, Sequence[float | None]]] = {}
    for name, values in by_layer.items():
        if layer := LAYER.search(name):
            kinds.setdefault(layer[2], {})[int(layer[1])] = values
    arrays = {}
    for kind, layers in kinds.items():
        arrays[kind] = np.full((max(layers) + 1, len(next(iter(layers.values())))), np.nan)
        for layer, values in layers.items():
            arrays[kind][layer] = [np.nan if value is None else value for value in values]
    return arrays


def mean_by_layer(runs: Sequence[ByLayer]) -> dict[str, list[float | None]]:
    """The mean by layer over runs with the same layers, cut to the shortest run."""
    length = min(len(values) for run in runs for values in run.values())
    return {
        layer: np.mean([np.array(run[layer][:length], dtype=float) for run in runs], axis=0).tolist()
        for layer in runs[0]
    }


def draw_mean_lambdas(result: Result) -> Figure:
    """The means over the final runs of a Hybrid."""
    runs = [record.lambdas for record in result.finals.values() if record.lambdas.by_layer]
    title = f"{result.method} on {result.task} with {result.model}"
    return draw_lambdas(title, runs[0].iterations, mean_by_layer([run.by_layer for run in runs]))


def draw_lambdas(title: str, iterations: Sequence[int], by_layer: ByLayer) -> Figure:
    """The maps alone, as a figure."""
    figure = new_figure(13, 4.2, title)
    draw_lambdas_into(figure, iterations, by_layer)
    return figure


def draw_lambdas_into(figure: Figure | SubFigure, iterations: Sequence[int], by_layer: ByLayer) -> None:
    """A panel for each kind of layer, side by side, with one scale from 0 to 1."""
    if not (arrays := maps(by_layer)):
        return
    panels = np.atleast_1d(figure.subplots(1, len(arrays), sharey=True))
    first, last = iterations[0], iterations[min(len(iterations), next(iter(arrays.values())).shape[1]) - 1]
    half = (last - first) / max(len(iterations) - 1, 1) / 2 or 0.5
    look = {"vmin": 0, "vmax": 1, "aspect": "auto", "origin": "lower", "interpolation": "nearest", "cmap": "PuOr"}
    for axes, (kind, values) in zip(panels, arrays.items(), strict=True):
        axes.imshow(values, extent=(first - half, last + half, -0.5, len(values) - 0.5), **look)
        axes.set_title(kind, loc="left", fontsize=11)
        axes.set_xlabel("iteration")
    panels[0].set_ylabel("layer")
    panels[0].yaxis.set_major_locator(MaxNLocator(integer=True))
    figure.colorbar(panels[-1].images[0], ax=list(panels), label="λ: low-rank 1, rotation 0", fraction=0.02)


# Lines of metrics.jsonl as curves.


def series(records: Sequence[Mapping[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Return (iterations, values) of the records that hold `name`."""
    points = [(record["iteration"], record[name]) for record in records if record.get(name) is not None]
    return [iteration for iteration, _ in points], [float(value) for _, value in points]
