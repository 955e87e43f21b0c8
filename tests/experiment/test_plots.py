"""Figures show what was measured: costs, curves, lambda by layer; the same numbers give the same file."""

from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from megatron_peft.experiment import plots
from megatron_peft.experiment.cell_record import write_record
from megatron_peft.experiment.plots import color, new_figure, save, style, svg
from megatron_peft.experiment.results import Results, read_results
from megatron_peft.experiment.tables import rows
from tests.experiment.small_results import record_of


def small() -> Figure:
    figure = new_figure(3, 2, "A title")
    axes = figure.subplots()
    axes.plot([1, 2], [3, 4], color=color(0))
    style(axes, "Loss")
    return figure


def test_the_same_figure_has_the_same_svg_and_both_files_replace_the_old_ones(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"old")
    save(small(), tmp_path, "a")
    assert (tmp_path / "a.svg").read_text() == svg(small())
    assert ElementTree.fromstring(svg(small())).tag.endswith("svg")
    assert {path.name for path in tmp_path.iterdir()} == {"a.png", "a.svg"}
    assert imread(tmp_path / "a.png").shape[:2] == (240, 360)


def test_bars_are_minutes_and_gigabytes_of_each_method(found: Results) -> None:
    left, right = plots.draw_cost(found, "talk").axes
    assert [bar.get_height() for bar in left.patches] == [1.0] * 3
    assert [bar.get_height() for bar in right.patches] == [2.0] * 3
    assert [label.get_text() for label in left.get_xticklabels()] == ["lora", "lora-ga", "hybrid"]


def test_mean_is_over_the_runs_that_were_measured(found: Results, tmp_path: Path) -> None:
    cells = found.all[0].group.finals[1]
    write_record(tmp_path, cells[1], record_of(cells[1], epoch_seconds=None))
    write_record(tmp_path, cells[2], record_of(cells[2], epoch_seconds=180.0))
    again = read_results(tmp_path)
    assert plots.measured(again.all[0], *plots.EPOCH) == [1.0, 3.0]
    assert plots.cost_table(again).rows[0][5] == "2.000"


def test_lines_are_means_over_the_seeds(found: Results) -> None:
    left, right = plots.draw_dynamics(found, "tiny", "talk").axes
    assert [line.get_label() for line in left.lines] == ["lora", "lora-ga", "hybrid"]
    lora = left.lines[0].get_xydata()
    assert lora[-1].tolist() == pytest.approx([1.0, 2.06])
    assert len(right.lines[0].get_xydata()) == 20, "40 gradient norms, two to a point"


def test_the_headline_has_a_dot_for_each_run_and_colors_the_best(found: Results) -> None:
    (axes,) = plots.draw_results(rows(found, "hybrid")).axes
    assert axes.get_title("left") == "talk: accuracy (higher is better)"
    assert np.array(axes.lines[1].get_ydata()).tolist() == pytest.approx([84.9, 84.8, 84.4])
    assert [line.get_color() for line in axes.lines] == [plots.BEFORE, plots.AFTER, plots.BEFORE]
    assert [text.get_text() for text in axes.texts] == ["79.40", "84.70", "83.70"]


def test_averages_keep_the_mean_of_the_curve_and_short_curves_stay() -> None:
    epochs, values = plots.averages([[at, at / 10, float(at)] for at in range(1, 41)], 4)
    assert values.tolist() == [5.5, 15.5, 25.5, 35.5] and epochs.tolist() == pytest.approx([0.55, 1.55, 2.55, 3.55])
    epochs, values = plots.averages([[1, 0.5, 3.0], [2, 1.0, 2.0]], 20)
    assert (epochs.tolist(), values.tolist()) == ([0.5, 1.0], [3.0, 2.0])


QKV = "decoder.layers.{}.self_attention.linear_qkv"
FC1 = "decoder.layers.{}.mlp.linear_fc1"


def test_map_of_lambda_is_layer_by_step_for_each_kind_and_the_mean_is_over_runs() -> None:
    found = plots.maps({QKV.format(0): [0.1, 0.2], QKV.format(1): [0.3, 0.4], FC1.format(1): [0.5, None]})
    assert found["linear_qkv"].tolist() == [[0.1, 0.2], [0.3, 0.4]]
    assert np.isnan(found["linear_fc1"]).tolist() == [[True, True], [False, True]]
    assert plots.mean_by_layer([{"a": [0.2, 0.4, 0.9]}, {"a": [0.4, 0.8]}]) == {"a": pytest.approx([0.3, 0.6])}


def test_panels_share_one_scale_and_cover_the_run_be_it_a_step_or_nothing() -> None:
    figure = plots.draw_lambdas("Hybrid", [10, 20, 30], {QKV.format(3): [0.1, 0.2, 0.3], FC1.format(0): [0.5] * 3})
    *panels, _ = figure.axes
    assert [axes.get_title(loc="left") for axes in panels] == ["linear_qkv", "linear_fc1"]
    assert [axes.images[0].get_clim() for axes in panels] == [(0, 1), (0, 1)]
    assert panels[0].get_xlim() == (5, 35) and panels[0].images[0].get_extent()[2:] == [-0.5, 3.5]
    assert plots.draw_lambdas("Hybrid", [7], {QKV.format(0): [0.5]}).axes[0].get_xlim() == (6.5, 7.5)
    for by_layer in ({}, {"embedding": [0.5]}):
        assert plots.draw_lambdas("Hybrid", [1], by_layer).axes == []
