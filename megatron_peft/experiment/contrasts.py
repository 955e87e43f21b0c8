"""Contrasts: differences between two methods that an experiment's file asks for before there is a run, and the answers.

Runs of one seed are pairs, measured on the same items. An interval holds for other seeds, and for other texts of the
kind.
"""

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import NamedTuple

import numpy as np
from scipy.optimize import brentq
from scipy.stats import nct, t, ttest_1samp

from megatron_peft.experiment.records import CellRecord
from megatron_peft.experiment.results import Result, Results, metrics
from megatron_peft.experiment.spec import Contrast

QUANTILES = (0.025, 0.05, 0.95, 0.975)
SIGNIFICANT, POWER = 0.05, 0.8


class Comparison(NamedTuple):
    """A paired t-test over the seeds that two methods have: same data order, same draws.

    `difference` is the mean, from `low` to `high` with 95% confidence; `p` is two-sided and not corrected for the
    number of comparisons.
    """

    difference: float
    low: float
    high: float
    p: float


def compare(differences: np.ndarray) -> Comparison | None:
    """Return the test of the differences between pairs; None for fewer than two, or if all are the same (no spread)."""
    if len(differences) < 2:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of differences without spread
        test = ttest_1samp(differences, 0)
        low, high = test.confidence_interval()
    if not math.isfinite(test.statistic):
        return None
    return Comparison(*map(float, (np.mean(differences), low, high, test.pvalue)))


def interval(sums: np.ndarray, counts: np.ndarray) -> list[float]:
    """Return `QUANTILES` of the mean of sums [seeds, items] over counts [items], of Student's t.

    Its variance is that of the seeds' means, in which is what each item has of its own with each seed, and that of the
    items' means without it. (A bootstrap that draws both counts that part three times.) The degrees of freedom are
    Satterthwaite's.
    """
    (num_seeds, num_items), total = sums.shape, counts.sum()
    by_seed, by_item = sums.sum(1) / total, sums.mean(0)
    mean = by_seed.mean()
    of_seeds, of_items = by_seed.var(ddof=1) / num_seeds, 0.0
    if num_items > 1:
        of_both = sums - by_item - np.outer(by_seed - mean, counts)
        squares = ((by_item - mean * counts) ** 2).sum() - (of_both**2).sum() / (num_seeds * (num_seeds - 1))
        of_items = max(num_items / (num_items - 1) * squares / total**2, 0.0)
    variance = of_seeds + of_items
    parts = of_seeds**2 / (num_seeds - 1) + of_items**2 / max(num_items - 1, 1)
    freedom = variance**2 / parts if parts else num_seeds - 1
    return (mean + np.sqrt(variance) * t.ppf(QUANTILES, freedom)).tolist()


def detectable(values: np.ndarray, num_comparisons: int) -> float:
    """Return the mean difference that a t-test over such pairs finds in `POWER` of cases, at `SIGNIFICANT` for all."""
    freedom, error = len(values) - 1, np.std(values, ddof=1) / np.sqrt(len(values))
    limit = t.isf(SIGNIFICANT / num_comparisons / 2, freedom)
    return float(error * brentq(lambda shift: nct.sf(limit, freedom, shift) - POWER, 0, 4 * limit))


def holm(values: Sequence[float]) -> list[float]:
    """Return p-values after Holm's correction, which scipy lacks (`false_discovery_control` has Benjamini's alone)."""
    order = np.argsort(values)
    steps = np.asarray(values, dtype=float)[order] * np.arange(len(values), 0, -1)
    return np.maximum.accumulate(steps).clip(max=1)[np.argsort(order)].tolist()


class Answer(NamedTuple):
    """What the runs say to a contrast, on a task with a model: that of `result`, of the method `contrast.of`.

    obstacle: why there is no verdict; num_pairs: of runs; num_items: 0 if only the runs' own numbers are known.
    quantiles: the `interval` of the difference; None for fewer than two pairs, as is `difference`.
    p: of a paired t-test over the seeds, None without spread; holm: the same, corrected for all contrasts.
    detectable: the difference that this test would probably find.
    """

    contrast: Contrast
    result: Result
    obstacle: str
    num_pairs: int
    num_items: int = 0
    difference: float | None = None
    quantiles: Sequence[float] | None = None
    p: float | None = None
    holm: float | None = None
    detectable: float | None = None

    @property
    def verdict(self) -> str:
        if self.obstacle or self.quantiles is None:
            return f"no verdict: {self.obstacle}"
        (lowest, low, high, highest), contrast = self.quantiles, self.contrast
        if -contrast.margin < low and high < contrast.margin:
            return f"equivalent within {contrast.margin:g}: the difference is between {low:+.4f} and {high:+.4f} (90%)"
        is_off_0, p = lowest > 0 or highest < 0, 1.0 if self.holm is None else self.holm
        if is_off_0 and p < SIGNIFICANT:
            higher_is_better = metrics(self.result.group.task).get(contrast.metric, False)
            better = contrast.of if (lowest > 0) == higher_is_better else contrast.against
            least, most = sorted((abs(lowest), abs(highest)))
            return f"{better} is better by {abs(self.difference or 0.0):.4f} ({least:.4f} to {most:.4f})"
        but = f", but p is {p:.3f} after Holm's correction" if is_off_0 else ""
        return f"undecided: the difference is between {lowest:+.4f} and {highest:+.4f}{but}"


def answers(results: Results) -> list[Answer]:
    """Return the answer to each contrast, on each task with each model, in the order of the file."""
    experiment, recorded = results.experiment, _asked(results)
    asked_of = [*product(experiment.contrasts, experiment.models, experiment.tasks)]
    uncorrected = []
    for contrast, model, task in asked_of:
        by_method = {result.method: result for result in results.of(model.name, task.name)}
        of, against = by_method[contrast.of], by_method[contrast.against]
        seeds = sorted(of.values(contrast.metric).keys() & against.values(contrast.metric).keys())
        num_wanted = len(of.seeds_of(contrast.metric) & against.seeds_of(contrast.metric))
        num_early = sum(names.get(contrast.name) != experiment.asked[contrast.name] for names in recorded)
        untuned = [result.method for result in (of, against) if result.why_not_tuned]
        obstacles = {
            f"{num_early} of {len(recorded)} final runs began before it was written down as it is": num_early > 0,
            f"not tuned: {', '.join(untuned)}": len(untuned) > 0,
            f"{len(seeds)} of {num_wanted} pairs of runs are in": len(seeds) < num_wanted,
        }
        answer = Answer(contrast, of, next((why for why, is_so in obstacles.items() if is_so), ""), len(seeds))
        if len(seeds) > 1:
            sums, counts = differences([(of.finals[seed], against.finals[seed]) for seed in seeds], contrast.metric)
            by_seed = sums.sum(1) / counts.sum()
            test = compare(by_seed)
            answer = answer._replace(
                num_items=len(counts) if len(counts) > 1 else 0,
                difference=float(by_seed.mean()),
                quantiles=interval(sums, counts),
                p=test.p if test else None,
                detectable=detectable(by_seed, len(asked_of)) if test else None,
            )
        uncorrected.append(answer)
    # What has no verdict yet counts among the comparisons.
    corrected = holm([1.0 if answer.p is None or answer.obstacle else answer.p for answer in uncorrected])
    return [answer._replace(holm=p) for answer, p in zip(uncorrected, corrected, strict=True)]


def _asked(results: Results) -> list[Mapping[str, object]]:
    """Return the contrasts that each final run's record has, of whatever point of its grid it is."""
    trained = ((result.group.seeds, run) for result in results.all for run in result.records.values() if run.is_trained)
    return [record.contrasts for seeds, record in trained if record.seed in seeds]


def differences(runs: Sequence[tuple[CellRecord, CellRecord]], metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Return [seeds, items] sums of the first runs less those of the second, and [items] counts.

    Of runs whose items are not known, or not the same: [seeds, 1] differences of the metric, and 1.
    """
    items = [[record.items.get(metric, ()) for record in pair] for pair in runs]
    lengths = {len(each) for pair in items for each in pair}
    if len(lengths) == 1 and lengths != {0}:
        numbers = np.array(items)  # [seeds, 2, items, sum and count]
        if (numbers[..., 1] == numbers[0, 0, :, 1]).all():
            return numbers[:, 0, :, 0] - numbers[:, 1, :, 0], numbers[0, 0, :, 1]
    values = np.array([[record.value(metric) for record in pair] for pair in runs], dtype=float)
    return values[:, :1] - values[:, 1:], np.ones(1)


def sentences(results: Results, answers: Sequence[Answer]) -> Iterator[str]:
    """Yield a sentence for each answer, and one for contrasts that the runs know and the file no longer has."""
    for answer in answers:
        spec, result = answer.contrast, answer.result
        place = f"{result.task} with {result.model}" if len(results.experiment.models) > 1 else result.task
        yield f"{spec.name}, {spec.of} - {spec.against} in {spec.metric} on {place}: **{answer.verdict}**."
    names = {name for of_run in _asked(results) for name in of_run}
    if gone := sorted(names - results.experiment.asked.keys()):
        yield f"**Taken out:** the file had {', '.join(gone)} when runs began, and no longer has."
