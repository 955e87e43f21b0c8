from __future__ import annotations

from pathlib import Path

import pytest

from megatron_peft.experiment.record import CellRecord
from megatron_peft.reporting.steps_to_loss import StepsTo, crossing, steps_to
from tests.reporting.small_results import results

CURVE = [(10, 3.0), (20, 2.0), (40, 1.0), (60, 1.5)]


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (2.5, (15, False)),
        (1.5, (30, False)),
        (1.0, (40, False)),
        (0.9, None),
        (3.0, (10, False)),
        (3.5, (10, True)),  # some step before the first measurement
    ],
)
def test_crossing_lies_on_the_line_between_measurements(loss: float, expected: tuple[float, bool] | None) -> None:
    assert crossing(CURVE, loss) == expected


def run(*losses: float) -> CellRecord:
    curve = [[10 * at, at / 10, loss] for at, loss in enumerate(losses, start=1)]
    return CellRecord("m", "t", "x", {}, 1, (), 1, "trained", curves={"validation_loss": curve})


def test_half_the_steps_are_two_times_fewer() -> None:
    slow, fast = {1: run(4, 3, 2, 1)}, {1: run(3, 1, 0.5, 0.2)}
    at_10, at_20, _, at_40 = steps_to(fast, slow)
    assert at_10 == StepsTo(10, 1.0, True, 1, 1)
    assert at_20 == StepsTo(20, 2.0, False, 1, 1)
    assert at_40 == StepsTo(40, 2.0, False, 1, 1)


def test_runs_are_paired_by_seed_and_those_that_never_arrive_are_counted() -> None:
    found = steps_to({1: run(3, 1), 2: run(9, 9), 7: run(0, 0)}, {1: run(4, 2), 2: run(4, 2)})
    assert found[-1] == StepsTo(20, 20 / 15, False, 1, 2)


def test_no_common_seed_gives_nothing() -> None:
    assert steps_to({1: run(1)}, {2: run(1)}) == []


def test_a_method_against_itself_takes_the_same_steps(tmp_path: Path) -> None:
    lora = results(tmp_path).all[0]
    assert [(one.steps, one.times_fewer) for one in steps_to(lora.finals, lora.finals)] == [(10, 1), (20, 1), (40, 1)]
