"""One picture of a translation run: loss, gradient norm, BLEU before and after, translations beside the reference.

A Hybrid's has lambda by layer, too.
"""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.transforms import Bbox

from megatron_peft.reporting import lambda_plot
from megatron_peft.reporting.drawing import GUIDE, new_figure, style

BEFORE, AFTER = "#9aa5b1", "#1f6feb"
LAMBDA_INCHES = 3.4
COLUMNS = ("English", "Reference", "Before", "After")
COLUMN_CHARACTERS = 42
MOST_LINES = 3  # of a cell


@dataclass(frozen=True)
class Translation:
    """A message, how it should read, and what the model said before and after training."""

    source: str
    reference: str
    before: str
    after: str


def plot_run(
    path: Path,
    title: str,
    records: Sequence[Mapping[str, Any]],
    bleu: tuple[float, float],
    validation_loss: tuple[float, float],
    translations: Sequence[Translation],
    lambdas: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Draw the run into a PNG.

    Args:
        path: of the picture; replaced as a whole.
        records: lines of metrics.jsonl: iteration, loss, grad_norm, validation_loss where it was measured.
        bleu, validation_loss: before and after training.
        translations: about six fill the page.
        lambdas: lines of lambda.jsonl; empty for methods other than the Hybrid.
    """
    heights = [4.2, *([LAMBDA_INCHES] if lambdas else []), 0.6 + 0.62 * len(translations)]
    figure = new_figure(13, sum(heights) + 0.5)
    figure.suptitle(title, fontsize=14, fontweight="bold")
    rows = figure.add_gridspec(len(heights), 1, height_ratios=heights)
    curves, *middle, texts = [figure.add_subfigure(rows[at]) for at in range(len(heights))]
    left, centre, right = curves.subplots(1, 3, width_ratios=[5, 5, 3])
    _draw_loss(left, records, validation_loss)
    _draw_curve(centre, "Gradient norm", *_series(records, "grad_norm"))
    _draw_bars(right, "BLEU", bleu)
    for part in middle:
        lambda_plot.draw_into(part, *lambda_plot.read_lines(lambdas))
    _draw_translations(texts.subplots(), translations)
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, format="png", dpi=120)
    temporary.replace(path)


def _draw_loss(axes: Axes, records: Sequence[Mapping[str, Any]], validation_loss: tuple[float, float]) -> None:
    iterations, losses = _series(records, "loss")
    _draw_curve(axes, "Loss", iterations, losses)
    axes.lines[-1].set_label("training")
    measured = dict(zip(*_series(records, "validation_loss"), strict=True))
    measured |= {0: validation_loss[0], max(iterations, default=1): validation_loss[1]}
    axes.plot(*zip(*sorted(measured.items()), strict=True), "o--", color="#d1242f", markersize=5, label="held out")
    axes.legend(frameon=False)


def _draw_curve(axes: Axes, title: str, iterations: Sequence[int], values: Sequence[float]) -> None:
    axes.plot(iterations, values, color=AFTER, linewidth=1.8)
    style(axes, title)
    axes.set_xlabel("iteration")


def _draw_bars(axes: Axes, title: str, before_and_after: tuple[float, float]) -> None:
    bars = axes.bar(["before", "after"], before_and_after, color=[BEFORE, AFTER], width=0.6)
    axes.bar_label(bars, fmt="%.1f", padding=3, fontweight="bold")
    axes.margins(y=0.15)
    style(axes, title)


def _draw_translations(axes: Axes, translations: Sequence[Translation]) -> None:
    axes.axis("off")
    texts = [[_wrapped(text) for text in (t.source, t.reference, t.before, t.after)] for t in translations]
    if not texts:
        return
    table = axes.table(texts, colLabels=COLUMNS, cellLoc="left", colLoc="left", bbox=Bbox.unit())
    table.auto_set_font_size(False)
    table.set_fontsize(9)
    for (row, column), cell in table.get_celld().items():
        cell.set_edgecolor(GUIDE)
        cell.visible_edges = "B"
        cell.PAD = 0.02
        text = cell.get_text()
        text.set_parse_math(False)  # a message may hold dollar signs
        if row == 0:
            text.set_fontweight("bold")
        elif COLUMNS[column] in ("Before", "After"):
            text.set_color(AFTER if COLUMNS[column] == "After" else "#57606a")


def _series(records: Sequence[Mapping[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """(iterations, values) of the records that hold `name`."""
    points = [(record["iteration"], record[name]) for record in records if record.get(name) is not None]
    return [iteration for iteration, _ in points], [value for _, value in points]


def _wrapped(text: str) -> str:
    lines = textwrap.wrap(text, COLUMN_CHARACTERS, max_lines=MOST_LINES, placeholder=" …")
    return "\n".join(lines) or "(nothing)"
