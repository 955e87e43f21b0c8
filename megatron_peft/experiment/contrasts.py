"""Contrasts: differences between two methods that an experiment's file asks for before there is a run, and the answers.

Runs of one seed are pairs, measured on the same items. The bootstrap draws seeds and items anew, so that its interval
holds for other seeds, and for other texts of the kind.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import product
from typing import NamedTuple

import numpy as np

from megatron_peft.experiment.cell_record import CellRecord, json_digest
from megatron_peft.experiment.results import Result, Results, compare_seeds, metrics
from megatron_peft.experiment.spec import Contrast, Experiment
from megatron_peft.experiment.tables import Table

NUM_DRAWS, AT_ONCE = 10_000, 500
QUANTILES = (0.025, 0.05, 0.95, 0.975)
SIGNIFICANT = 0.05


def contrast_digests(experiment: Experiment) -> dict[str, str]:
    """Name -> digest of the contrast and of its methods' seeds. A record keeps what was asked when its run began."""
    seeds = {method.name: experiment.seeds_of(method) for method in experiment.methods}
    return {one.name: json_digest([asdict(one), seeds[one.of], seeds[one.against]]) for one in experiment.contrasts}


class Answer(NamedTuple):
    """What the runs say to a contrast, on a task with a model: that of `result`, of the method `contrast.of`.

    obstacle: why there is no verdict; num_pairs: of runs; num_items: 0 if only the runs' own numbers are known.
    quantiles: the `interval` of the difference; None for fewer than two pairs, as is `difference`.
    p: of a paired t-test over the seeds, None without spread; holm: the same, corrected for all contrasts.
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

    @property
    def verdict(self) -> str:
        if self.obstacle or self.quantiles is None:
            return f"no verdict: {self.obstacle}"
        (lowest, low, high, highest), one = self.quantiles, self.contrast
        if -one.margin < low and high < one.margin:
            return f"equivalent within {one.margin:g}"
        is_off_0, p = lowest > 0 or highest < 0, 1.0 if self.holm is None else self.holm
        if is_off_0 and p < SIGNIFICANT:
            higher_is_better = metrics(self.result.group.task).get(one.metric, False)
            better = one.of if (lowest > 0) == higher_is_better else one.against
            return f"{better} is better by {abs(self.difference or 0.0):.4f}"
        but = f", but p is {p:.3f} after Holm's correction" if is_off_0 else ""
        return f"undecided: the difference is between {lowest:+.4f} and {highest:+.4f}{but}"


def answers(results: Results) -> list[Answer]:
    """The answer to each contrast, on each task with each model, in the order of the file."""
    experiment, digests, asked = results.experiment, contrast_digests(results.experiment), _asked(results)
    found = []
    for contrast, model, task in product(experiment.contrasts, experiment.models, experiment.tasks):
        by_method = {result.method: result for result in results.of(model.name, task.name)}
        of, against = by_method[contrast.of], by_method[contrast.against]
        seeds = sorted(of.values(contrast.metric).keys() & against.values(contrast.metric).keys())
        num_wanted = len({*of.group.seeds} & {*against.group.seeds})
        num_early = sum(names.get(contrast.name) != digests[contrast.name] for names in asked)
        untuned = [result.method for result in (of, against) if result.edges or result.untried]
        obstacles = {
            f"{num_early} of {len(asked)} final runs began before it was written down as it is": num_early > 0,
            f"not tuned: {', '.join(untuned)}": len(untuned) > 0,
            f"{len(seeds)} of {num_wanted} pairs of runs are in": len(seeds) < num_wanted,
        }
        answer = Answer(contrast, of, next((why for why, is_so in obstacles.items() if is_so), ""), len(seeds))
        if len(seeds) > 1:
            sums, counts = differences([(of.finals[seed], against.finals[seed]) for seed in seeds], contrast.metric)
            by_seed = dict(zip(seeds, (sums.sum(1) / counts.sum()).tolist(), strict=True))
            test = compare_seeds(by_seed, dict.fromkeys(by_seed, 0.0))
            answer = answer._replace(
                num_items=len(counts) if len(counts) > 1 else 0,
                difference=float(np.mean([*by_seed.values()])),
                quantiles=interval(sums, counts),
                p=test.p if test else None,
            )
        found.append(answer)
    # What is not measured yet counts among the comparisons.
    corrected = holm([1.0 if answer.p is None else answer.p for answer in found])
    return [answer._replace(holm=p) for answer, p in zip(found, corrected, strict=True)]


def _asked(results: Results) -> list[dict[str, str]]:
    """The digests of contrasts that each final run's record has."""
    records = (record for result in results.all for record in result.finals.values())
    return [record.provenance.get("training", {}).get("contrasts", {}) for record in records]


def differences(runs: Sequence[tuple[CellRecord, CellRecord]], metric: str) -> tuple[np.ndarray, np.ndarray]:
    """[seeds, items] sums of the first runs less those of the second, and [items] counts. Of runs whose items are not
    known, or not the same: [seeds, 1] differences of the metric, and 1.
    """
    items = [[record.items.get(metric, ()) for record in pair] for pair in runs]
    lengths = {len(each) for pair in items for each in pair}
    if len(lengths) == 1 and lengths != {0}:
        numbers = np.array(items)  # [seeds, 2, items, sum and count]
        if (numbers[..., 1] == numbers[0, 0, :, 1]).all():
            return numbers[:, 0, :, 0] - numbers[:, 1, :, 0], numbers[0, 0, :, 1]
    values = np.array([[record.value(metric) for record in pair] for pair in runs], dtype=float)
    return values[:, :1] - values[:, 1:], np.ones(1)


def interval(sums: np.ndarray, counts: np.ndarray) -> list[float]:
    """`QUANTILES` of the mean of sums [seeds, items] over counts [items].

    Those of the bootstrap are as far off as a normal distribution's. The spread of few seeds is hardly known, so they
    are moved on to where Student's are: of six seeds by a third.
    """
    from scipy.stats import norm, t  # of the extra `report`

    mean = sums.sum() / (len(sums) * counts.sum())
    drawn = np.quantile(bootstrap(sums, counts), QUANTILES)
    return (mean + (drawn - mean) * t.ppf(QUANTILES, len(sums) - 1) / norm.ppf(QUANTILES)).tolist()


def bootstrap(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """[NUM_DRAWS] means of sums [seeds, items] over counts [items], each of seeds and items that are drawn anew.

    One seed less is drawn than there are: n of n would have a variance that is too small by (n - 1) / n.
    """
    draws, (num_seeds, num_items) = np.random.default_rng(0), sums.shape
    means = []
    for _ in range(NUM_DRAWS // AT_ONCE):
        seeds = draws.multinomial(num_seeds - 1, np.full(num_seeds, 1 / num_seeds), AT_ONCE)  # [draws, seeds]
        items = draws.multinomial(num_items, np.full(num_items, 1 / num_items), AT_ONCE)  # [draws, items]
        means.append(((seeds @ sums) * items).sum(1) / ((num_seeds - 1) * (items @ counts)))
    return np.concatenate(means)


def holm(values: Sequence[float]) -> list[float]:
    """p-values after Holm's correction for their number, which scipy lacks."""
    order = np.argsort(values)
    steps = np.asarray(values, dtype=float)[order] * np.arange(len(values), 0, -1)
    return np.maximum.accumulate(steps).clip(max=1)[np.argsort(order)].tolist()


def sentences(results: Results, found: Sequence[Answer]) -> Iterator[str]:
    """A sentence for each answer, and one for contrasts that the runs know and the file no longer has."""
    for answer in found:
        one, result = answer.contrast, answer.result
        place = f"{result.task} with {result.model}" if len(results.experiment.models) > 1 else result.task
        yield f"{one.name}, {one.of} - {one.against} in {one.metric} on {place}: **{answer.verdict}**."
    names = {name for of_run in _asked(results) for name in of_run}
    if gone := sorted(names - {one.name for one in results.experiment.contrasts}):
        yield f"**Taken out:** the file had {', '.join(gone)} when runs began, and no longer has."


def contrast_table(found: Sequence[Answer]) -> Table:
    """The numbers of the answers."""

    def line(answer: Answer) -> tuple[str, ...]:
        one, quantiles = answer.contrast, answer.quantiles
        return (
            *(one.name, answer.result.model, answer.result.task, f"{one.of} - {one.against}", one.metric),
            *(str(answer.num_pairs), str(answer.num_items or "–"), f"{one.margin:g}"),
            "–" if answer.difference is None else f"{answer.difference:+.4f}",
            "–" if quantiles is None else f"{quantiles[0]:+.4f} to {quantiles[-1]:+.4f}",
            *("–" if answer.p is None or p is None else f"{p:.3f}" for p in (answer.p, answer.holm)),
        )

    words = ("contrast", "model", "task", "difference", "metric")
    return Table(
        "Contrasts that were written down before the runs",
        (*words, "pairs", "items", "margin", "mean", "95% interval", "p", "p (Holm)"),
        tuple(map(line, found)),
        f"Intervals: of {NUM_DRAWS:,} draws of seeds and items, widened for the number of seeds. p: a paired t-test "
        "over the seeds, then corrected by Holm's method for the number of contrasts. Equivalent: the 90% interval is "
        f"within the margin. Better: the 95% interval is off 0, and the corrected p below {SIGNIFICANT}.",
        text_columns=len(words),
    )
