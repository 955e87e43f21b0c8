"""The constants of the shipped clusters against published runs, and the tables of docs/published-runs.md."""

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from megatron_peft.plan.timing import ERRORS, Accuracy
from tools.published import (
    Step,
    automodel_steps,
    bigscience_cluster,
    bigscience_steps,
    cluster_for,
    items,
    kendalls_tau,
    published,
    record,
    steps,
)

RECORDS = Path(__file__).parents[2] / "docs" / "results" / "planning"
STEPS = {step.name: step for step in steps()}
QUICK = ("Llama 3 70B, LoRA, NeMo, 8 H100", "GPT-3 175B, full recompute, 64 A100")


def recorded(name: str) -> list[list[str]]:
    """Rows that python -m tools.published docs/results/planning has written."""
    table: dict[str, Any] = json.loads((RECORDS / f"{name}.json").read_text())
    return table["rows"]


def planned(step: Step) -> float:
    [row] = [row for row in recorded("published") if row[0] == step.name]
    assert float(row[3]) == pytest.approx(step.seconds, rel=5e-3)
    assert row[1] == ("calibrates" if step.layout["calibrates"] else "reported")
    return float(row[4])


def test_chance_chose_the_half_that_calibrates():
    """The rule at the head of published.toml, whatever fits."""
    for gpu in ("h100", "a100"):
        layouts = [one for one in published()["layouts"] if one["gpu"] == gpu]
        ordered = sorted(layouts, key=lambda one: sha256(one["name"].encode()).hexdigest())
        assert [one["calibrates"] for one in ordered] == [number % 2 == 0 for number in range(len(ordered))]


def test_20_published_runs_of_every_kind_from_1_to_2048_gpus():
    sizes = [step.run.parallel.world_size for step in STEPS.values()]
    assert len(STEPS) >= 20 and min(sizes) == 1 and {2048, 2240} <= {*sizes}
    kinds = {(step.layout["gpu"], "lora" in step.layout) for step in STEPS.values()}
    assert kinds == {("h100", True), ("h100", False), ("a100", False)}


def test_the_reported_half_is_off_by_6_percent_in_the_median_and_12_at_most():
    """The wish was 6% and 15%; runs that nobody here has seen may be further off."""
    errors = {step.name: planned(step) / step.seconds - 1 for step in STEPS.values() if not step.layout["calibrates"]}
    of_layouts = {row[0]: float(row[2]) / float(row[1]) - 1 for row in recorded("bigscience")[:-1] if row[3]}
    told = json.loads(ERRORS.read_text())
    assert told["reported"] == pytest.approx(errors, abs=0.006)
    assert told["on another network"] == pytest.approx(of_layouts, abs=0.006)
    accuracy = Accuracy.reported()
    assert accuracy.median <= 0.06 and accuracy.worst <= 0.12 and len(accuracy.errors) == len(accuracy.elsewhere) == 13


def test_layouts_of_the_181b_model_are_ordered_better_than_by_chance():
    *rows, total = recorded("bigscience")
    assert len(rows) == 16
    assert [row[4] for row in rows] == ["no" if row[1] == "out of memory" else "yes" for row in rows]
    timed = [(float(row[1]), float(row[2])) for row in rows if row[1] != "out of memory"]
    assert f"{kendalls_tau(timed):.2f}" == total[2] and kendalls_tau(timed) >= 0.5


def test_kendalls_tau_is_1_for_the_same_order_and_minus_1_for_the_other_way_round():
    assert [kendalls_tau([(1, 1), (2, 4), (3, other)]) for other in (9, 2, 0)] == pytest.approx([1, 1 / 3, -1 / 3])


@pytest.mark.parametrize("chosen", [QUICK, pytest.param([*STEPS], marks=pytest.mark.slow)], ids=["two", "all"])
def test_the_records_are_those_of_todays_constants(chosen):
    named = [STEPS[name] for name in chosen]
    for step, of in zip(named, record(named), strict=True):
        assert planned(step) == pytest.approx(step.seconds_of(of, cluster_for(step.layout)), rel=6e-3)


@pytest.mark.slow
def test_so_is_the_first_layout_of_the_181b_model():
    step, [row, *_] = next(bigscience_steps()), recorded("bigscience")
    assert row[0] == step.layout["name"]
    assert float(row[2]) == pytest.approx(step.seconds_of(record([step])[0], bigscience_cluster()), rel=1e-3)


@pytest.mark.slow
def test_items_of_automodels_step_add_up_to_it():
    *parts, total = ((name, float(seconds)) for name, seconds in recorded("automodel"))
    assert total == ("published", 26.92)
    assert sum(seconds for _, seconds in parts) == pytest.approx(26.92, abs=0.03)
    assert all(seconds > 0 for _, seconds in parts)
    assert dict(parts) == pytest.approx(dict(items(automodel_steps())), abs=0.01)
