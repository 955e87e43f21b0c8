from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

from matplotlib.figure import Figure
from matplotlib.image import imread

from megatron_peft.reporting.drawing import COLOURS, colour, new_figure, save, style, svg


def drawn() -> Figure:
    figure = new_figure(3, 2, "A title")
    axes = figure.subplots()
    axes.plot([1, 2], [3, 4], color=colour(0))
    style(axes, "Loss")
    return figure


def test_svg_is_the_same_for_the_same_figure() -> None:
    assert svg(drawn()) == svg(drawn())
    assert ElementTree.fromstring(svg(drawn())).tag.endswith("svg")


def test_both_files_replace_the_old_ones_and_leave_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"old")
    save(drawn(), tmp_path, "a")
    assert {path.name for path in tmp_path.iterdir()} == {"a.png", "a.svg"}
    assert imread(tmp_path / "a.png").shape[:2] == (240, 360)


def test_colours_begin_again_after_the_last() -> None:
    assert colour(len(COLOURS)) == colour(0) != colour(1)
