"""Two methods' runs with the same seeds, held against one another."""

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

from scipy.stats import ttest_rel

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Comparison:
    """A paired t-test over the seeds that both methods have: same data order, same draws.

    Attributes:
        difference: mean of (this method - the reference).
        low, high: the confidence interval of it, 95%.
        p: two-sided; not corrected for the number of methods that are compared.
        num_pairs: two at least.
    """

    difference: float
    low: float
    high: float
    p: float
    num_pairs: int


def compare(values: Mapping[int, float], reference: Mapping[int, float]) -> Comparison | None:
    """Args: seed -> value. None: fewer than two seeds in common, or differences that are all the same (no spread)."""
    seeds = sorted(values.keys() & reference.keys())
    if len(seeds) < 2:
        return None
    ours, theirs = [values[seed] for seed in seeds], [reference[seed] for seed in seeds]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of differences without spread: answered below
        test = ttest_rel(ours, theirs)
        interval = test.confidence_interval(CONFIDENCE)
    difference = sum(a - b for a, b in zip(ours, theirs, strict=True)) / len(seeds)
    if not math.isfinite(test.statistic):
        return None
    return Comparison(difference, float(interval.low), float(interval.high), float(test.pvalue), len(seeds))
