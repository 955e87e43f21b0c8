"""The constants of the shipped clusters against published runs, and the tables of docs/planning.md."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_peft.planning.cluster import read_cluster
from megatron_peft.planning.published import Published, automodel_steps, items, lost_at_16384, published_runs

RECORDS = Path(__file__).parents[2] / "docs" / "results" / "planning"
MOST_OFF = {"calibrates": 0.01, "tests": 0.12}
FORMULAS_OFF = 0.03


def recorded(name: str) -> list[list[str]]:
    """Rows that python -m megatron_peft.planning.published docs/results/planning has written."""
    table: dict[str, Any] = json.loads((RECORDS / f"{name}.json").read_text())
    return table["rows"]


def planned(run: Published) -> float:
    [row] = [row for row in recorded("published") if row[0] == run.name]
    assert row[1:4] == [run.role, run.source, f"{run.seconds:.2f}"]
    return float(row[4])


@pytest.mark.parametrize("run", [one for one in published_runs() if "70B" not in one.name], ids=lambda one: one.name)
def test_a_published_step_is_planned(run):
    assert planned(run) == pytest.approx(run.seconds, rel=MOST_OFF[run.role])


@pytest.mark.parametrize("run", published_runs(), ids=lambda one: one.name)
def test_the_formulas_of_fit_give_the_time_of_the_recorded_schedule(run):
    """With today's constants: other ones need new records."""
    assert run.step.estimate(read_cluster(run.cluster)) == pytest.approx(planned(run), rel=FORMULAS_OFF)


def test_what_16384_gpus_lose_is_predicted_within_3_points():
    assert lost_at_16384({run.name: planned(run) for run in published_runs()}) == pytest.approx(1 - 400 / 430, abs=0.03)
    assert recorded("scaling")[0][1] == f"{1 - 400 / 430:.1%}"


def test_items_of_automodels_step_add_up_to_it():
    *parts, total = ((name, float(seconds)) for name, seconds in recorded("automodel"))
    assert total == ("published", 26.92)
    assert sum(seconds for _, seconds in parts) == pytest.approx(26.92, abs=0.03)
    assert all(seconds > 0 for _, seconds in parts)
    cluster = read_cluster("8xh100")
    estimated = items({name: times * step.estimate(cluster) for name, (times, step) in automodel_steps().items()})
    assert [name for name, _ in parts] == [name for name, _ in estimated]
    assert [seconds for _, seconds in parts] == pytest.approx([seconds for _, seconds in estimated], abs=0.5)


@pytest.mark.slow
@pytest.mark.parametrize("run", [one for one in published_runs() if "8B" in one.name], ids=lambda one: one.name)
def test_the_record_is_that_of_the_recorded_schedule(run):
    """The others take minutes each."""
    assert f"{run.step.seconds(read_cluster(run.cluster)):.2f}" == f"{planned(run):.2f}"
