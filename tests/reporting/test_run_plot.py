from __future__ import annotations

from pathlib import Path

import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from megatron_peft.reporting.run_plot import Translation, plot_run

RECORDS = [
    {"iteration": 10, "loss": 3.0, "grad_norm": 2.0},
    {"iteration": 20, "loss": 2.5, "grad_norm": 1.5, "validation_loss": 2.6},
    {"iteration": 30, "loss": None, "grad_norm": 1.0},  # a loss that was not a number
]
TRANSLATIONS = [Translation("Pay $5_^ or $6", "Payez 5 $", "", "Payez " + "beaucoup " * 40)]


@pytest.fixture
def drawn(tmp_path, monkeypatch) -> Figure:
    """The figure of a whole run, as it was saved."""
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k)))
    plot_run(tmp_path / "report.png", "A run", RECORDS, (3.0, 20.0), (4.0, 1.75), TRANSLATIONS)
    return figures[0]


def _axes(figure, title):
    return next(axes for axes in figure.axes if axes.get_title(loc="left") == title)


def test_the_picture_is_a_png_that_replaces_the_old_one(tmp_path):
    path = tmp_path / "report.png"
    path.write_bytes(b"old")
    plot_run(path, "A run", RECORDS, (3.0, 20.0), (4.0, 1.75), TRANSLATIONS)
    height, width, _ = imread(path).shape
    assert width > 1000 and height > 500
    assert list(tmp_path.iterdir()) == [path]


def test_a_run_without_records_still_has_its_scores(tmp_path):
    plot_run(tmp_path / "report.png", "A run", [], (3.0, 20.0), (4.0, 1.75), [])
    assert (tmp_path / "report.png").exists()


def test_curves_show_what_was_measured(drawn):
    training, held_out = _axes(drawn, "Loss").lines
    assert training.get_xydata().tolist() == [[10, 3.0], [20, 2.5]]
    assert held_out.get_xydata().tolist() == [[0, 4.0], [20, 1.75]]
    assert _axes(drawn, "Gradient norm").lines[0].get_xydata().tolist() == [[10, 2.0], [20, 1.5], [30, 1.0]]
    assert [bar.get_height() for bar in _axes(drawn, "BLEU").patches] == [3.0, 20.0]


def test_translations_stand_beside_their_reference_cut_to_fit(drawn):
    cells = drawn.axes[-1].tables[0].get_celld()
    source, reference, before, after = (cells[1, column].get_text().get_text() for column in range(4))
    assert (source, reference, before) == ("Pay $5_^ or $6", "Payez 5 $", "(nothing)")
    assert after.count("\n") == 2 and after.endswith("…")


def test_a_hybrid_has_its_lambdas_between_curves_and_translations(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), Path(a[0]).touch()))
    lambdas = [{"iteration": at, "lambda": {"decoder.layers.0.mlp.linear_fc1": at / 100}} for at in (10, 20)]
    plot_run(tmp_path / "r.png", "A run", RECORDS, (3.0, 20.0), (4.0, 1.75), TRANSLATIONS, lambdas)
    image = _axes(figures[0], "linear_fc1").images[0]
    assert image.get_array().tolist() == [[0.1, 0.2]] and image.get_clim() == (0, 1)
