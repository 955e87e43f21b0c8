"""Contrasts of made-up cells: their intervals and p-values, what is said of them, and when nothing may be said."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from scipy.stats import ttest_rel

from megatron_peft.experiment import contrasts
from megatron_peft.experiment.cell_record import CellRecord, of_cell, source_of, write_record
from megatron_peft.experiment.cells import Cell
from megatron_peft.experiment.contrasts import (
    answers,
    bootstrap,
    contrast_digests,
    differences,
    holm,
    interval,
    sentences,
)
from megatron_peft.experiment.report import build_report, html, markdown
from megatron_peft.experiment.results import Results, read_results
from megatron_peft.experiment.spec import EXPERIMENT_FILE
from tests.experiment.small_experiment import experiment

RATES = {"grid": {"lr": [0.1, 0.2, 0.4]}}
SEEDS = [1, 2, 3, 4, 5, 6]
COUNTS = [2, 3, 5, 8, 13]
TASK = {
    "flags": {"train-data-path": "train.jsonl", "valid-data-path": "valid.jsonl"},
    "tuning_valid_data_path": "tuning.jsonl",
    "score": {"command": "x {output}", "metrics": {"BLEU": {"path": "bleu"}}},
}
ASKED = {
    "size": {"of": "hybrid", "against": "lora", "margin": 0.05},
    "words": {"of": "hybrid", "against": "lora", "metric": "BLEU", "margin": 0.1},
    "speed": {"of": "hybrid", "against": "lora", "metric": "area", "margin": 0.1},
}
Change = Callable[[Cell, CellRecord], CellRecord | None]


def runs(folder: Path, gain: float, change: Change = lambda _, record: record, **changes: Any) -> Results:
    """All runs of LoRA and a Hybrid: of 5 items, each seed and item with noise of its own, which both methods share but
    for a hundredth. The Hybrid's loss is lower by `gain`, and so is its BLEU, a hundred times the loss.
    """
    settings: dict[str, Any] = {
        "flags": {"train-iters": 2, "log-validation-items": True},
        "tasks": {"talk": TASK},
        "methods": {"lora": RATES, "hybrid": RATES},
        "seeds": SEEDS,
        "tuning_seed": 9,
        "contrasts": ASKED,
    }
    folder.mkdir(exist_ok=True)
    found, groups = experiment(folder, **{**settings, **changes})
    draws = np.random.default_rng(3)
    shared = draws.normal(0, 0.3, (10, 5))
    for group in groups:
        own = draws.normal(0, 0.01, (10, 5)) - gain * (group.method.name == "hybrid")
        for cell in group.cells.values():
            if cell.seed != 9 and cell.settings["lr"] != "0.2":
                continue
            losses = 2 + shared[cell.seed] + own[cell.seed] + (cell.settings["lr"] != "0.2")
            items = [[round(loss * count, 6), count] for loss, count in zip(losses, COUNTS, strict=True)]
            loss = sum(loss_sum for loss_sum, _ in items) / sum(COUNTS)
            sources = {"training": {**source_of(found.text, cell), "contrasts": contrast_digests(found)}}
            sources |= {"score": source_of(found.text, cell, group.task.score)}
            values = {"items": {"validation loss": items}, "scores": {"BLEU": 100 * loss}, "provenance": sources}
            curves = {"validation_loss": [[1, 0.5, loss + 1], [2, 1.0, loss]]}
            record = of_cell(cell, "trained", validation_loss=loss, curves=curves, **values)
            if (changed := change(cell, record)) is not None:
                write_record(folder, cell, changed)
    (folder / EXPERIMENT_FILE).write_text(found.text)
    return read_results(folder)


def test_a_difference_is_that_of_the_items_and_p_that_of_the_seeds(tmp_path: Path) -> None:
    results = runs(tmp_path, gain=0.2)
    size, words, speed = answers(results)
    lora, hybrid = (result.values("validation loss") for result in results.all)
    expected = ttest_rel([hybrid[seed] for seed in SEEDS], [lora[seed] for seed in SEEDS])
    assert size.difference is not None and size.quantiles is not None
    assert size.p == pytest.approx(expected.pvalue, rel=1e-3) and size.difference == pytest.approx(-0.2, abs=0.01)
    assert (size.num_pairs, size.num_items, words.num_items, speed.num_items) == (6, 5, 0, 0)
    assert size.quantiles[0] < -0.2 + 0.01 < size.quantiles[-1] + 0.02
    assert speed.difference == pytest.approx(size.difference), "the mean of the curve is as much lower"
    assert size.verdict == f"hybrid is better by {-size.difference:.4f}"
    assert words.verdict.startswith("lora is better by "), "of its BLEU the higher is the better"


def test_a_small_difference_is_equivalent_and_a_noisy_one_undecided(tmp_path: Path) -> None:
    assert answers(runs(tmp_path, gain=0.01))[0].verdict == "equivalent within 0.05"
    noise = iter(np.random.default_rng(5).normal(0, 0.5, 99).tolist())

    def noisy(cell: Cell, record: CellRecord) -> CellRecord:
        extra = next(noise) if cell.seed != 9 else 0.0
        items = [[loss_sum + extra * count, count] for loss_sum, count in record.items["validation loss"]]
        return replace(record, items={"validation loss": items})

    found = answers(runs(tmp_path, 0.01, noisy))[0]
    assert found.quantiles is not None and found.quantiles[0] < 0 < found.quantiles[-1]
    lowest, highest = found.quantiles[0], found.quantiles[-1]
    assert found.verdict == f"undecided: the difference is between {lowest:+.4f} and {highest:+.4f}"
    many = found._replace(quantiles=(0.1, 0.11, 0.4, 0.5), holm=0.07)
    assert many.verdict.endswith("between +0.1000 and +0.5000, but p is 0.070 after Holm's correction")


def rewritten(folder: Path, **changes: Any) -> Results:
    """The same cells, of a file that was changed since."""
    path = folder / EXPERIMENT_FILE
    found, _ = experiment(folder, **{**yaml.safe_load(path.read_text()), **changes})
    path.write_text(found.text)
    return read_results(folder)


@pytest.mark.parametrize(
    ("name", "changes", "is_late"),
    [
        ("size", {"contrasts": {"size": {**ASKED["size"], "margin": 0.5}}}, True),
        ("other", {"contrasts": {**ASKED, "other": ASKED["size"]}}, True),
        ("size", {"contrasts": {**ASKED, "other": ASKED["size"]}}, False),
        ("size", {"seeds": SEEDS[:4]}, True),  # more or fewer than were planned
    ],
)
def test_a_contrast_that_was_written_down_after_a_final_run_has_no_verdict(
    tmp_path: Path, name: str, changes: dict[str, Any], is_late: bool
) -> None:
    runs(tmp_path, 0.2)
    (found,) = [one for one in answers(rewritten(tmp_path, **changes)) if one.contrast.name == name]
    assert ("final runs began before it was written down as it is" in found.verdict) == is_late
    assert found.verdict.startswith("hybrid is better by 0." if not is_late else "no verdict: ")


def test_a_contrast_that_was_taken_out_is_named(tmp_path: Path) -> None:
    runs(tmp_path, 0.2)
    results = rewritten(tmp_path, contrasts={"size": ASKED["size"]})
    *_, last = sentences(results, answers(results))
    assert last == "**Taken out:** the file had speed, words when runs began, and no longer has."


def test_an_arm_that_is_not_tuned_or_not_finished_has_no_verdict(tmp_path: Path) -> None:
    def at_the_edge(cell: Cell, record: CellRecord) -> CellRecord:
        if (cell.method, cell.settings["lr"], cell.seed) == ("lora", "0.4", 9):
            return replace(record, validation_loss=0.5)
        return record

    found = answers(runs(tmp_path / "edge", 0.2, at_the_edge))[0]
    assert found.verdict == "no verdict: not tuned: lora"
    found = answers(runs(tmp_path / "part", 0.2, lambda cell, record: None if cell.seed == 4 else record))[0]
    assert found.verdict == "no verdict: 5 of 6 pairs of runs are in" and found.num_pairs == 5


def test_other_items_are_not_compared_one_by_one(tmp_path: Path) -> None:
    lora, hybrid = ([record for record in result.finals.values()] for result in runs(tmp_path, 0.2).all)
    pairs = list(zip(hybrid, lora, strict=True))
    sums, counts = differences(pairs, "validation loss")
    assert sums.shape == (6, 5) and counts.tolist() == COUNTS
    fewer = [(a, replace(b, items={"validation loss": b.items["validation loss"][:4]})) for a, b in pairs]
    others = [[1.0, count + 1] for count in COUNTS]
    longer = [(a, replace(b, items={"validation loss": others})) for a, b in pairs]
    for changed in (fewer, longer):
        sums, counts = differences(changed, "validation loss")
        assert sums.shape == (6, 1) and counts.tolist() == [1]
        assert sums.mean() == pytest.approx(-0.2, abs=0.01)


def test_the_bootstrap_spreads_as_means_over_seeds_and_items_do() -> None:
    """Its variance is that of a mean over seeds, with n - 1, and of one over items."""
    draws = np.random.default_rng(1)
    by_seed, by_item = draws.normal(0, 1, (6, 1)), draws.normal(0, 1, (1, 400))
    counts = np.ones(400)
    for sums, variance in (
        (by_seed + np.zeros((1, 400)), by_seed.var(ddof=1) / 6),
        (by_item + np.zeros((6, 1)), by_item.var() / 400),
        (by_seed + by_item, by_seed.var(ddof=1) / 6 + by_item.var() / 400),
    ):
        means = bootstrap(sums, counts)
        assert means.shape == (contrasts.NUM_DRAWS,) and means.mean() == pytest.approx(sums.mean(), abs=0.02)
        assert means.var() == pytest.approx(variance, rel=0.05)
    long = np.array([1.0, 99.0])  # an item of many tokens counts as much as they are
    assert bootstrap(np.array([[1.0, 99.0]] * 3), long) == pytest.approx(1.0)


@pytest.mark.parametrize(("num_seeds", "most"), [(3, 0.1), (6, 0.075)])
def test_an_interval_of_few_seeds_is_rarely_off_0_by_chance(num_seeds: int, most: float, monkeypatch) -> None:
    """Without its widening it is in 24% of three seeds, and in 9% of six."""
    monkeypatch.setattr(contrasts, "NUM_DRAWS", 1000)
    draws, num_off = np.random.default_rng(2), 0
    for _ in range(400):
        lowest, *_, highest = interval(draws.normal(0, 1, (num_seeds, 1)), np.ones(1))
        num_off += lowest > 0 or highest < 0
    assert num_off / 400 <= most


def test_the_interval_of_seeds_alone_is_that_of_student() -> None:
    differences_of_seeds = np.random.default_rng(4).normal(0.1, 1, (20, 1))
    found = interval(differences_of_seeds, np.ones(1))
    expected = ttest_rel(differences_of_seeds[:, 0], np.zeros(20)).confidence_interval(0.95)
    assert (found[0], found[-1]) == pytest.approx((expected.low, expected.high), abs=0.05)


def test_holm_is_that_of_r() -> None:
    """p.adjust(c(0.01, 0.04, 0.03, 0.005), "holm")"""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0] and holm([]) == []


def test_report_says_the_verdicts_first_and_has_their_numbers(tmp_path: Path) -> None:
    found = build_report(runs(tmp_path, gain=0.2), "hybrid")
    text = markdown(found)
    said = text.index("size, hybrid - lora in validation loss on talk: **hybrid is better by 0.")
    assert said < text.index("On talk, **") < text.index("## Contrasts") and "Not tuned" not in text
    (line,) = [line for line in text.splitlines() if line.startswith("| size | tiny | talk | hybrid - lora |")]
    assert line.count("|") == 13 and "| 6 | 5 | 0.05 | -0." in line
    assert "size, hybrid - lora in validation loss on talk: hybrid is better by 0." in html(found)
