from __future__ import annotations

from pathlib import Path

import pytest

from megatron_peft.reporting.dynamics_plot import averages, draw
from tests.reporting.small_results import results


def test_lines_are_means_over_the_seeds(tmp_path: Path) -> None:
    left, right = draw(results(tmp_path), "tiny", "talk").axes
    assert [line.get_label() for line in left.lines] == ["lora", "lora-ga", "hybrid"]
    lora = right.lines[0].get_xydata()
    assert lora[-1].tolist() == pytest.approx([1.0, 2.06])
    assert len(left.lines[0].get_xydata()) == 20, "40 gradient norms, two to a point"


def test_averages_keep_the_mean_of_the_curve() -> None:
    curve = [[at, at / 10, float(at)] for at in range(1, 41)]
    epochs, values = averages(curve, 4)
    assert values.tolist() == [5.5, 15.5, 25.5, 35.5] and epochs.tolist() == pytest.approx([0.55, 1.55, 2.55, 3.55])


def test_short_curves_stay_as_they_are() -> None:
    epochs, values = averages([[1, 0.5, 3.0], [2, 1.0, 2.0]], 20)
    assert (epochs.tolist(), values.tolist()) == ([0.5, 1.0], [3.0, 2.0])
