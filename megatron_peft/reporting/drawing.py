"""What the plots have in common: a figure without a display, the look of its axes, and its files."""

import io
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

GUIDE = "#d0d7de"
COLOURS = ("#1f6feb", "#d1242f", "#1a7f37", "#9a6700", "#8250df", "#0a7f8c", "#bf3989", "#57606a", "#e16f24", "#24292f")
DOTS_AN_INCH = 120


def new_figure(width: float, height: float, title: str = "") -> Figure:
    """Sizes in inches."""
    figure = Figure(figsize=(width, height), facecolor="white")
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.1)
    FigureCanvasAgg(figure)
    if title:
        figure.suptitle(title, fontsize=12, fontweight="bold")
    return figure


def style(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=11)
    axes.grid(axis="y", color=GUIDE, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def colour(position: int) -> str:
    return COLOURS[position % len(COLOURS)]


def svg(figure: Figure) -> str:
    """The same text for the same figure, at any time."""
    output = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "megatron-peft"}):
        figure.savefig(output, format="svg", metadata={"Date": None})
    return output.getvalue()


def save(figure: Figure, folder: Path, name: str) -> None:
    """NAME.png and NAME.svg, each whole or not at all."""
    _write(folder / f"{name}.svg", svg(figure).encode())
    output = io.BytesIO()
    figure.savefig(output, format="png", dpi=DOTS_AN_INCH)
    _write(folder / f"{name}.png", output.getvalue())


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}")
    temporary.write_bytes(content)
    temporary.replace(path)
