from __future__ import annotations

import math
import random
from statistics import mean, stdev

import pytest

from megatron_peft.reporting.comparison import compare


def test_difference_and_statistic_are_those_of_the_pairs() -> None:
    """t = mean(d) / (sd(d) / sqrt(n)); the 97.5% point of t with two degrees of freedom is 4.303."""
    random.seed(1)
    ours, theirs = ({seed: random.gauss(0, 1) for seed in (1, 2, 3)} for _ in range(2))
    differences = [ours[seed] - theirs[seed] for seed in (1, 2, 3)]
    found = compare(ours, theirs)
    assert found is not None and found.num_pairs == 3
    assert found.difference == pytest.approx(mean(differences))
    half = 4.30265 * stdev(differences) / math.sqrt(3)
    assert (found.low, found.high) == pytest.approx((mean(differences) - half, mean(differences) + half), rel=1e-4)
    assert (found.p < 0.05) == (abs(found.difference) > half)


def test_pairs_are_of_the_same_seed() -> None:
    """A large spread over seeds that both share does not hide a small difference."""
    theirs = {1: 10.0, 2: 20.0, 3: 30.0}
    found = compare({1: 10.1, 2: 20.11, 3: 30.09}, theirs)
    assert found is not None and found.p < 0.01


def test_seeds_of_one_alone_are_left_out() -> None:
    found = compare({1: 1.0, 2: 3.0, 5: 100.0}, {1: 0.0, 2: 1.0, 3: 7.0})
    assert found is not None and (found.num_pairs, found.difference) == (2, 1.5)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [({1: 1.0}, {1: 2.0}), ({1: 1.0, 2: 2.0}, {3: 1.0, 4: 2.0}), ({1: 1.0, 2: 2.0}, {1: 0.5, 2: 1.5})],
    ids=["one pair", "no pair", "no spread"],
)
def test_nothing_is_claimed_where_nothing_can_be_said(ours: dict[int, float], theirs: dict[int, float]) -> None:
    assert compare(ours, theirs) is None
