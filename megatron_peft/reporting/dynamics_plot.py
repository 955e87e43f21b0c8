"""Figure 2: gradient norm and validation loss of each method, by epoch."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_peft.experiment.results import Result, Results
from megatron_peft.reporting.drawing import colour, new_figure, style

MOST_POINTS = 20  # of a curve of gradient norms: each is the mean over its part of the run
Curve = tuple[np.ndarray, np.ndarray]  # epochs, values


def draw(results: Results, model: str, task: str) -> Figure:
    """A line for each method, the mean over its seeds; the band is from the least to the greatest of them."""
    figure = new_figure(12, 4.6, f"{model}, {task}")
    left, right = figure.subplots(1, 2)
    for at, result in enumerate(results.of(model, task)):
        _draw_method(left, result, "grad_norm", colour(at))
        _draw_method(right, result, "validation_loss", colour(at))
    for axes, title in ((left, "Gradient norm"), (right, "Validation loss")):
        style(axes, title)
        axes.set_xlabel("epoch")
    left.set_ylim(bottom=0)
    right.legend(*left.get_legend_handles_labels(), frameon=False, fontsize=8)
    return figure


def _draw_method(axes: Axes, result: Result, name: str, line_colour: str) -> None:
    curves = [record.curves[name] for record in result.finals.values() if record.curves.get(name)]
    if not curves:
        return
    averaged = [averages(curve, MOST_POINTS) for curve in curves]
    length = min(len(epochs) for epochs, _ in averaged)
    epochs = averaged[0][0][:length]
    values = np.stack([values[:length] for _, values in averaged])
    axes.plot(epochs, values.mean(axis=0), color=line_colour, linewidth=1.6, label=result.method)
    if len(values) > 1:
        axes.fill_between(epochs, values.min(axis=0), values.max(axis=0), color=line_colour, alpha=0.15, linewidth=0)


def averages(curve: Sequence[Sequence[float]], most: int) -> Curve:
    """Means over `most` parts of the curve, of about the same number of points; a short curve stays as it is.

    Args: curve: [iteration, epoch, value] of each point.
    """
    points = np.array([(epoch, value) for _, epoch, value in curve])
    means = np.array([part.mean(axis=0) for part in np.array_split(points, min(most, len(points)))])
    return means[:, 0], means[:, 1]
