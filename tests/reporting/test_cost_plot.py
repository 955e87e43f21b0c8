from __future__ import annotations

from pathlib import Path

import pytest

from megatron_peft.experiment.record import write_record
from megatron_peft.reporting.cost_plot import draw, epoch_minutes, mean_of, table
from megatron_peft.reporting.results import read_results
from tests.reporting.small_results import record_of, results


def test_bars_are_minutes_and_gigabytes_of_each_method(tmp_path: Path) -> None:
    left, right = draw(results(tmp_path), "talk").axes
    assert [bar.get_height() for bar in left.patches] == [1.0] * 3
    assert [bar.get_height() for bar in right.patches] == [2.0] * 3
    assert [label.get_text() for label in left.get_xticklabels()] == ["lora", "lora-ga", "hybrid"]


def test_mean_is_over_the_runs_that_were_measured(tmp_path: Path) -> None:
    cells = results(tmp_path).all[0].group.finals[1]
    write_record(tmp_path, cells[1], record_of(cells[1], epoch_seconds=None))
    write_record(tmp_path, cells[2], record_of(cells[2], epoch_seconds=180.0))
    assert mean_of(read_results(tmp_path).all[0], epoch_minutes) == pytest.approx(2.0)


def test_table_has_what_the_figure_shows(tmp_path: Path) -> None:
    assert table(results(tmp_path)).rows[2] == ("tiny", "talk", "hybrid", "1,000", "0.500", "1.000", "2.000")
