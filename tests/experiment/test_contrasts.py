"""Contrasts of made-up cells: their intervals and p-values, what is said of them, and when nothing may be said."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from scipy.stats import ttest_1samp, ttest_rel

from megatron_peft.experiment.cells import Cell
from megatron_peft.experiment.contrasts import answers, detectable, differences, holm, interval, sentences
from megatron_peft.experiment.records import CellRecord, as_json, of_cell, write_record
from megatron_peft.experiment.report import build_report, html, markdown, not_tuned
from megatron_peft.experiment.results import Results, read_results
from megatron_peft.experiment.spec import EXPERIMENT_FILE
from megatron_peft.experiment.tables import contrast_table
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
            sources = {"contrasts": found.asked, "score": as_json(group.task.score)}
            values = {"items": {"validation loss": items}, "scores": {"BLEU": 100 * loss}, **sources}
            curves = {"validation_loss": [[1, 0.5, loss + 1], [2, 1.0, loss]]}
            record = of_cell(cell, "trained", validation_loss=loss, curves=curves, **values)
            if (changed := change(cell, record)) is not None:
                write_record(folder, changed)
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
    assert size.difference == pytest.approx(np.mean([hybrid[seed] - lora[seed] for seed in SEEDS]), rel=1e-5)
    assert size.quantiles[0] < -0.2 + 0.01 < size.quantiles[-1] + 0.02
    assert speed.difference == pytest.approx(size.difference), "the mean of the curve is as much lower"
    between = f"({-size.quantiles[-1]:.4f} to {-size.quantiles[0]:.4f})"
    assert size.verdict == f"hybrid is better by {-size.difference:.4f} {between}"
    assert words.verdict.startswith("lora is better by "), "of its BLEU the higher is the better"


def test_a_small_difference_is_equivalent_and_a_noisy_one_undecided(tmp_path: Path) -> None:
    small = answers(runs(tmp_path, gain=0.01))[0]
    assert small.verdict.startswith("equivalent within 0.05: the difference is between -0.0")
    of_margin = small._replace(contrast=replace(small.contrast, margin=0.025), quantiles=(-0.03, -0.02, 0.02, 0.03))
    assert of_margin.verdict == "equivalent within 0.025: the difference is between -0.0200 and +0.0200 (90%)"
    assert of_margin._replace(quantiles=(-0.04, -0.03, 0.02, 0.03)).verdict.startswith("undecided")
    noise = iter(np.random.default_rng(5).normal(0, 0.5, 99).tolist())

    def noisy(cell: Cell, record: CellRecord) -> CellRecord:
        extra = next(noise) if cell.seed != 9 else 0.0
        items = [[loss_sum + extra * count, count] for loss_sum, count in record.items["validation loss"]]
        return replace(record, items={"validation loss": items})

    found = answers(runs(tmp_path, 0.01, noisy))[0]
    assert found.quantiles is not None and found.quantiles[0] < 0 < found.quantiles[-1]
    lowest, highest = found.quantiles[0], found.quantiles[-1]
    assert found.verdict == f"undecided: the difference is between {lowest:+.4f} and {highest:+.4f}"
    alike = found._replace(quantiles=(-0.1, 0.11, 0.4, 0.5), holm=0.001)
    assert alike.verdict == "undecided: the difference is between -0.1000 and +0.5000", "seeds agree, items do not"
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
        ("size", {"methods": {"lora": {**RATES, "seeds": SEEDS[:4]}, "hybrid": RATES}}, True),
    ],
)
def test_a_contrast_that_was_written_down_after_a_final_run_has_no_verdict(
    tmp_path: Path, name: str, changes: dict[str, Any], is_late: bool
) -> None:
    runs(tmp_path, 0.2)
    (found,) = [one for one in answers(rewritten(tmp_path, **changes)) if one.contrast.name == name]
    assert ("final runs began before it was written down as it is" in found.verdict) == is_late
    assert found.verdict.startswith("hybrid is better by 0." if not is_late else "no verdict: ")


def test_a_contrast_or_a_place_that_was_taken_out_is_named(tmp_path: Path) -> None:
    runs(tmp_path, 0.2, tasks={"talk": TASK, "chat": TASK})
    results = rewritten(tmp_path, contrasts={"size": ASKED["size"]}, tasks={"talk": TASK})
    *_, last = sentences(results, answers(results))
    assert last == "**Taken out:** the file had chat with tiny, speed, words when runs began, and no longer has."


@pytest.mark.parametrize("rate", ["0.2", "0.4"])
def test_final_runs_of_any_rate_and_method_must_have_begun_after_the_contrast(tmp_path: Path, rate: str) -> None:
    """Also those of a rate that is no longer the chosen one."""

    def late(cell: Cell, record: CellRecord) -> CellRecord:
        return replace(record, contrasts={}) if cell.method == "hybrid" and cell.seed == 3 else record

    runs(tmp_path, 0.2, late if rate == "0.2" else lambda _, record: record)
    if rate == "0.4":
        found, groups = experiment(tmp_path, **yaml.safe_load((tmp_path / EXPERIMENT_FILE).read_text()))
        (cell,) = [one for one in groups[1].cells.values() if (one.seed, one.settings["lr"]) == (3, rate)]
        write_record(tmp_path, of_cell(cell, "trained", validation_loss=9.0))
    found = answers(read_results(tmp_path))[0]
    assert "1 of 1" in found.verdict and "began before it was written down" in found.verdict


def test_a_contrast_without_a_verdict_counts_among_those_that_p_is_corrected_for(tmp_path: Path) -> None:
    def lost(cell: Cell, record: CellRecord) -> CellRecord:
        return replace(record, scores={}) if cell.seed == 3 else record

    words, size = answers(runs(tmp_path, 0.2, lost, contrasts={name: ASKED[name] for name in ("words", "size")}))
    assert words.verdict == "no verdict: 5 of 6 pairs of runs are in" and words.p is not None and size.p is not None
    assert (words.holm, size.holm) == (1, 2 * size.p)


def test_an_arm_that_is_not_tuned_or_not_finished_has_no_verdict(tmp_path: Path) -> None:
    def at_the_edge(cell: Cell, record: CellRecord) -> CellRecord:
        if (cell.method, cell.settings["lr"], cell.seed) == ("lora", "0.4", 9):
            return replace(record, validation_loss=0.5)
        return record

    found = answers(runs(tmp_path / "edge", 0.2, at_the_edge))[0]
    assert found.verdict == "no verdict: not tuned: lora"

    def untried(cell: Cell, record: CellRecord) -> CellRecord | None:
        return None if (cell.method, cell.settings["lr"]) == ("lora", "0.1") else record

    assert answers(runs(tmp_path / "untried", 0.2, untried))[0].verdict == "no verdict: not tuned: lora"

    def crashed(cell: Cell, record: CellRecord) -> CellRecord:
        is_so = (cell.method, cell.settings["lr"]) == ("lora", "0.4")
        return replace(record, status="failed", reason="killed") if is_so else record

    crash = runs(tmp_path / "crashed", 0.2, crashed)
    assert answers(crash)[0].verdict == "no verdict: not tuned: lora"
    assert [*not_tuned(crash)] == ["**Not tuned,** since points of the grid failed or are missing: tiny, talk: lora."]
    found = answers(runs(tmp_path / "part", 0.2, lambda cell, record: None if cell.seed == 4 else record))[0]
    assert found.verdict == "no verdict: 5 of 6 pairs of runs are in" and found.num_pairs == 5


def test_a_score_of_all_runs_that_are_to_have_one_has_a_verdict(tmp_path: Path) -> None:
    def scored(cell: Cell, record: CellRecord) -> CellRecord:
        return record if cell.seed < 5 else replace(record, scores={})

    found = runs(tmp_path, 0.2, scored, tasks={"talk": {**TASK, "scored_seeds": [1, 2, 3, 4]}})
    words = answers(found)[1]
    assert words.num_pairs == 4 and words.verdict.startswith("lora is better by ")


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


def test_an_interval_has_the_spread_of_seeds_and_of_items_and_what_they_have_together_once() -> None:
    """95% and 90% intervals of 600 made-up experiments cover the truth as often as they say, and none too often."""
    draws, covered = np.random.default_rng(1), np.zeros(2)
    counts = draws.integers(5, 40, 200).astype(float)
    for number in range(600):
        of_seeds, of_items = (0.0, 0.5) if number % 2 else (0.1, 0.0)
        noise = draws.normal(0, of_seeds, (6, 1)) + draws.normal(0, of_items, 200) + draws.normal(0, 1, (6, 200))
        lowest, low, high, highest = interval(noise * counts, counts)
        covered += [lowest < 0 < highest, low < 0 < high]
    assert covered / 600 == pytest.approx([0.95, 0.9], abs=0.03)


@pytest.mark.parametrize("num_seeds", [2, 6])
def test_the_interval_of_seeds_alone_is_that_of_student(num_seeds: int) -> None:
    values = np.random.default_rng(4).normal(0.1, 1, (num_seeds, 1))
    test = ttest_rel(values[:, 0], np.zeros(num_seeds))
    wide, narrow = test.confidence_interval(0.95), test.confidence_interval(0.9)
    assert interval(values, np.ones(1)) == pytest.approx([wide.low, narrow.low, narrow.high, wide.high])
    assert interval(np.array([[1.0, 99.0]] * 3), np.array([1.0, 99.0])) == [1.0] * 4, "a long item counts as its tokens"


def test_what_is_detectable_is_found_in_four_of_five_cases() -> None:
    draws = np.random.default_rng(0)
    values = draws.normal(0, 1, 6)
    values *= 0.02 / values.std(ddof=1)
    found = [ttest_1samp(draws.normal(detectable(values, 4), 0.02, 6), 0).pvalue < 0.05 / 4 for _ in range(1000)]
    assert np.mean(found) == pytest.approx(0.8, abs=0.04)


def test_holm_is_that_of_r() -> None:
    """p.adjust(c(0.01, 0.04, 0.03, 0.005), "holm")"""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0] and holm([]) == []


def test_report_says_the_verdicts_first_and_has_their_numbers(tmp_path: Path) -> None:
    found = build_report(runs(tmp_path, gain=0.2), "hybrid")
    text = markdown(found)
    said = text.index("size, hybrid - lora in validation loss on talk: **hybrid is better by 0.")
    assert (
        said < text.index("On talk, validation loss against hybrid: **") < text.index("## Contrasts")
        and "Not tuned" not in text
    )
    (line,) = [line for line in text.splitlines() if line.startswith("| size | tiny | talk | hybrid - lora |")]
    assert line.count("|") == 14 and "| 6 | 5 | 0.05 | -0." in line
    answer = answers(runs(tmp_path, gain=0.003))[0]
    numbers = [f"{one:.3f}" for one in (answer.p, answer.holm)]
    assert numbers[0] != numbers[1] and [*contrast_table([answer]).frame.iloc[0, -3:-1]] == numbers
    assert "size, hybrid - lora in validation loss on talk: hybrid is better by 0." in html(found)
