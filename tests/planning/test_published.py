"""The constants of the shipped clusters against published runs, and the tables of docs/planning.md."""

import json
from pathlib import Path

import pytest

from megatron_peft.planning.cluster import read_cluster
from megatron_peft.planning.published import automodel_items, lost_at_16384, published_runs, tables

RECORDS = Path(__file__).parents[2] / "docs" / "results" / "planning"
MOST_OFF = {"calibrates": 0.01, "tests": 0.12}


@pytest.mark.parametrize("run", [one for one in published_runs() if "70B" not in one.name], ids=lambda one: one.name)
def test_a_published_step_is_planned(run):
    assert run.planned(read_cluster(run.cluster)) == pytest.approx(run.seconds, rel=MOST_OFF[run.role])


def test_what_16384_gpus_lose_is_predicted_within_3_points():
    assert lost_at_16384(read_cluster("8xh100")) == pytest.approx(1 - 400 / 430, abs=0.03)


def test_items_of_automodels_step_add_up_to_it():
    items = dict(automodel_items(read_cluster("8xh100")))
    assert sum(items.values()) == pytest.approx(26.92) and all(seconds > 0 for seconds in items.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["published", "scaling", "automodel"])
def test_records_are_those_of_the_constants(name):
    """python -m megatron_peft.planning.published docs/results/planning"""
    assert json.loads((RECORDS / f"{name}.json").read_text()) == tables()[name]
