"""Figures show what was measured: costs, curves, lambda by layer, a whole run; the same numbers give the same file."""

from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from megatron_peft.experiment import plots
from megatron_peft.experiment.plots import Translation, color, new_figure, plot_run, save, style, svg
from megatron_peft.experiment.record import write_record
from megatron_peft.experiment.results import Results, read_results
from tests.experiment.small_results import record_of


def small() -> Figure:
    figure = new_figure(3, 2, "A title")
    axes = figure.subplots()
    axes.plot([1, 2], [3, 4], color=color(0))
    style(axes, "Loss")
    return figure


def test_svg_is_the_same_for_the_same_figure() -> None:
    assert svg(small()) == svg(small())
    assert ElementTree.fromstring(svg(small())).tag.endswith("svg")


def test_both_files_replace_the_old_ones_and_leave_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"old")
    save(small(), tmp_path, "a")
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
    assert plots.mean_of(read_results(tmp_path).all[0], plots.epoch_minutes) == pytest.approx(2.0)


def test_lines_are_means_over_the_seeds(found: Results) -> None:
    left, right = plots.draw_dynamics(found, "tiny", "talk").axes
    assert [line.get_label() for line in left.lines] == ["lora", "lora-ga", "hybrid"]
    lora = right.lines[0].get_xydata()
    assert lora[-1].tolist() == pytest.approx([1.0, 2.06])
    assert len(left.lines[0].get_xydata()) == 20, "40 gradient norms, two to a point"


def test_averages_keep_the_mean_of_the_curve_and_short_curves_stay() -> None:
    epochs, values = plots.averages([[at, at / 10, float(at)] for at in range(1, 41)], 4)
    assert values.tolist() == [5.5, 15.5, 25.5, 35.5] and epochs.tolist() == pytest.approx([0.55, 1.55, 2.55, 3.55])
    epochs, values = plots.averages([[1, 0.5, 3.0], [2, 1.0, 2.0]], 20)
    assert (epochs.tolist(), values.tolist()) == ([0.5, 1.0], [3.0, 2.0])


QKV = "decoder.layers.{}.self_attention.linear_qkv"
FC1 = "decoder.layers.{}.mlp.linear_fc1"


def test_map_of_lambda_is_layer_by_step_for_each_kind() -> None:
    found = plots.maps({QKV.format(0): [0.1, 0.2], QKV.format(1): [0.3, 0.4], FC1.format(1): [0.5, None]})
    assert found["linear_qkv"].tolist() == [[0.1, 0.2], [0.3, 0.4]]
    assert np.isnan(found["linear_fc1"]).tolist() == [[True, True], [False, True]]


def test_mean_of_lambda_is_over_runs() -> None:
    assert plots.mean_by_layer([{"a": [0.2, 0.4, 0.9]}, {"a": [0.4, 0.8]}]) == {"a": pytest.approx([0.3, 0.6])}


def test_panels_share_one_scale_and_cover_the_run() -> None:
    figure = plots.draw_lambdas("Hybrid", [10, 20, 30], {QKV.format(3): [0.1, 0.2, 0.3], FC1.format(0): [0.5] * 3})
    *panels, _ = figure.axes
    assert [axes.get_title(loc="left") for axes in panels] == ["linear_qkv", "linear_fc1"]
    assert [axes.images[0].get_clim() for axes in panels] == [(0, 1), (0, 1)]
    assert panels[0].get_xlim() == (5, 35) and panels[0].images[0].get_extent()[2:] == [-0.5, 3.5]


def test_a_single_step_is_drawn_and_nothing_is_an_empty_figure() -> None:
    assert plots.draw_lambdas("Hybrid", [7], {QKV.format(0): [0.5]}).axes[0].get_xlim() == (6.5, 7.5)
    for by_layer in ({}, {"embedding": [0.5]}):
        assert plots.draw_lambdas("Hybrid", [1], by_layer).axes == []


RECORDS = [
    {"iteration": 10, "loss": 3.0, "grad_norm": 2.0},
    {"iteration": 20, "loss": 2.5, "grad_norm": 1.5, "validation_loss": 2.6},
    {"iteration": 30, "loss": None, "grad_norm": 1.0},  # a loss that was not a number
]
TRANSLATIONS = [Translation("Pay $5_^ or $6", "Payez 5 $", "", "Payez " + "beaucoup " * 40)]
SCORES = (3.0, 20.0), (4.0, 1.75)


@pytest.fixture
def drawn(tmp_path, monkeypatch) -> Callable[..., Figure]:
    """Draws a run as it is saved, over an older picture."""
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k)))
    (tmp_path / "report.png").write_bytes(b"old")

    def draw(records=RECORDS, translations=TRANSLATIONS, *more) -> Figure:
        plot_run(tmp_path / "report.png", "A run", records, *SCORES, translations, *more)
        return figures[-1]

    return draw


def _axes(figure):
    return {axes.get_title(loc="left"): axes for axes in figure.axes}


def test_the_picture_of_a_run_is_a_png_that_replaces_the_old_one(drawn, tmp_path):
    for arguments in ((), ([], [])):  # a run without records still has its scores
        drawn(*arguments)
        height, width, _ = imread(tmp_path / "report.png").shape
        assert width > 1000 and height > 500
        assert [path.name for path in tmp_path.iterdir()] == ["report.png"]


def test_curves_show_what_was_measured(drawn):
    axes = _axes(drawn())
    training, held_out = axes["Loss"].lines
    assert training.get_xydata().tolist() == [[10, 3.0], [20, 2.5]]
    assert held_out.get_xydata().tolist() == [[0, 4.0], [20, 1.75]]
    assert axes["Gradient norm"].lines[0].get_xydata().tolist() == [[10, 2.0], [20, 1.5], [30, 1.0]]
    assert [bar.get_height() for bar in axes["BLEU"].patches] == [3.0, 20.0]


def test_translations_stand_beside_their_reference_cut_to_fit(drawn):
    cells = drawn().axes[-1].tables[0].get_celld()
    source, reference, before, after = (cells[1, column].get_text().get_text() for column in range(4))
    assert (source, reference, before) == ("Pay $5_^ or $6", "Payez 5 $", "(nothing)")
    assert after.count("\n") == 2 and after.endswith("…")


def test_a_hybrid_has_its_lambdas_between_curves_and_translations(drawn):
    lambdas = [{"iteration": at, "lambda": {"decoder.layers.0.mlp.linear_fc1": at / 100}} for at in (10, 20)]
    image = _axes(drawn(RECORDS, TRANSLATIONS, lambdas))["linear_fc1"].images[0]
    assert image.get_array().tolist() == [[0.1, 0.2]] and image.get_clim() == (0, 1)
    assert image.axes.get_xlim() == (5, 25)
