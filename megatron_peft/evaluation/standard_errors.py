"""Standard errors of statistics that have no formula (F1, Matthews' correlation, BLEU, perplexity): the jackknife.

The statistic is computed once for each item, or group of items, that is left out. With t_i the values without group i,
of g groups:

    error = sqrt((g - 1) / g  sum_i (t_i - mean t)^2)

Equal items give equal values. Of pairs of labels there are few kinds, so F1 over 40,000 answers takes four computations
and is exact; where items differ, as texts do, they form `NUM_GROUPS` groups, which knows the error to about a sixth.
"""

import math
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Statistic = Callable[[Sequence[Any]], float]

NUM_GROUPS = 20
NO_JACKKNIFE = {"median", "bypass"}  # not smooth: leaving one item out says nothing about its error


class WithError:
    """A statistic that also keeps its standard error at each call.

    Args:
        statistic: items -> number, as lm-evaluation-harness's aggregations.

    Attributes:
        errors: of the calls so far; None where there is none.
    """

    def __init__(self, statistic: Statistic) -> None:
        self._statistic = statistic
        self.errors: list[float | None] = []

    def __call__(self, items: Sequence[Any]) -> float:
        has_error = getattr(self._statistic, "__name__", "") not in NO_JACKKNIFE
        self.errors.append(jackknife_error(self._statistic, items) if has_error else None)
        return self._statistic(items)


def jackknife_error(statistic: Statistic, items: Sequence[Any], num_groups: int = NUM_GROUPS) -> float | None:
    """The standard error of `statistic(items)`; None of a single item, or where it is not a finite number."""
    left_out = _kinds(items, num_groups)
    num_values = sum(count for _, count in left_out)
    if num_values < 2:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # sklearn's, about a label that the others lack
        values = [(float(statistic(rest)), count) for rest, count in left_out]
    mean = sum(value * count for value, count in values) / num_values
    squares = sum(count * (value - mean) ** 2 for value, count in values)
    error = math.sqrt((num_values - 1) / num_values * squares)
    return error if math.isfinite(error) else None


def _kinds(items: Sequence[Any], num_groups: int) -> list[tuple[list[Any], int]]:
    """(the items without one of a kind, how many are of that kind); or the items without every 20th, once each."""
    places = _places(items)
    if len(places) <= num_groups:
        return [([*items[:place], *items[place + 1 :]], count) for place, count in places.items()]
    size = min(num_groups, len(items))
    return [([item for index, item in enumerate(items) if index % size != group], 1) for group in range(size)]


def _places(items: Sequence[Any]) -> Mapping[int, int]:
    """Where the first item of each kind is -> how many are of that kind."""
    try:
        kinds = Counter(items)
    except TypeError:  # lists, or tuples of lists: no two are taken for equal
        return dict.fromkeys(range(len(items)), 1)
    first: dict[Any, int] = {}
    for place, item in enumerate(items):
        first.setdefault(item, place)
    return {first[kind]: count for kind, count in kinds.items()}
