"""Steps take turns fairly, and ratios are of turns, not of sums."""

from __future__ import annotations

import time

import pytest

from megatron_peft.benchmark import timing


def test_every_second_turn_runs_the_other_way_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "NUM_WARMUPS", 1)
    order: list[str] = []
    steps = {name: lambda name=name: order.append(name) for name in "ab"}
    seconds = timing.take_turns(steps, num_turns=2)
    assert "".join(order) == "ba" + "ab" + "ba"
    assert {name: len(turns) for name, turns in seconds.items()} == {"a": 2, "b": 2}


def test_late_turns_end_after_the_fewest() -> None:
    seconds = timing.take_turns({"a": lambda: None}, num_turns=10, is_late=lambda: True)
    assert len(seconds["a"]) == timing.FEWEST_TURNS


def test_waiting_costs_nothing_and_work_does() -> None:
    def work() -> None:
        end = time.process_time() + 0.1
        while time.process_time() < end:
            pass

    seconds = timing.take_turns({"waits": lambda: time.sleep(0.1), "works": work}, num_turns=1)
    assert seconds["waits"][0] < 0.05 < 0.1 <= seconds["works"][0]


def test_ranks_are_added_up_turn_by_turn() -> None:
    assert timing.over_ranks([{"a": [1.0, 2.0]}, {"a": [10.0, 20.0]}]) == {"a": [11.0, 22.0]}


def test_ratio_is_the_median_of_the_turns() -> None:
    assert timing.median_ratio([2.0, 30.0, 3.0], [1.0, 10.0, 3.0]) == 2.0
