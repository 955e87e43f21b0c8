"""What docs/results/README.md says in words is so in the committed records. Its tables are compared by other tests."""

from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import pytest
from scipy.stats import ttest_rel

from megatron_peft.config.untrusted import read_json
from megatron_peft.experiment.cell_record import CellRecord, json_digest, read_file
from megatron_peft.experiment.contrasts import holm
from megatron_peft.experiment.results import Result, Results, compare_seeds, read_results

RECORDS = Path(__file__).parents[2] / "docs" / "results"
LEAST_LAMBDA = 0.02


@pytest.fixture(scope="module")
def claim() -> Results:
    return read_results(RECORDS / "claim")


def finals(name: str) -> dict[str, Mapping[int, CellRecord]]:
    return {result.method: result.finals for result in read_results(RECORDS / name).all}


def tuned(result: Result) -> dict[float, Any]:
    """The loss of each rate that was tried."""
    points = {float(cell.point.removeprefix("lr=")): record for cell, record in result.tuning}
    return {rate: record.validation_loss for rate, record in sorted(points.items()) if record}


def fall_between_rates(result: Result) -> float:
    """From the best rate's loss to the vertex of a parabola through it and its neighbours."""
    losses = tuned(result)
    rates = [*losses]
    at = rates.index(min(rates, key=losses.__getitem__))
    a, b, c = np.polyfit(np.log(rates[at - 1 : at + 2]), [losses[rate] for rate in rates[at - 1 : at + 2]], 2)
    return losses[rates[at]] - (c - b * b / (4 * a))


def beside(name: str, method: str, claim: Results, other: str) -> tuple[Mapping[int, CellRecord], list[float]]:
    """Final runs of an experiment, and how far each is above the claim's run of that method and seed."""
    runs = finals(name)[method]
    assert sorted(runs) == [1, 2, 3]
    [others] = [result.finals for result in claim.all if result.method == other]
    data = [record.provenance["training"]["data_sha256"].items() for record in (*others.values(), *runs.values())]
    assert all(data[-1] <= files for files in data), "the claim's has a text besides, of what is forgotten"
    return runs, [record.validation_loss - others[seed].validation_loss for seed, record in sorted(runs.items())]


def test_lambda_ends_at_its_lower_limit_in_more_than_eight_of_ten_matrices(claim: Results) -> None:
    [hybrid] = [result for result in claim.all if result.method == "hybrid"]
    for record in hybrid.finals.values():
        ends = [values[-1] for values in record.lambdas["by_layer"].values()]
        assert len(ends) == 120 and mean(value < 1.01 * LEAST_LAMBDA for value in ends) > 0.8


def test_gradients_by_depth_differ_by_about_four_and_less_with_lora_and_beside_one_layer(claim: Results) -> None:
    for result in claim.all:
        runs = [record.grad_norms["by_layer"] for record in result.finals.values()]
        norms = np.mean([[np.mean(values) for values in run.values()] for run in runs], axis=0)
        usual = np.delete(norms, 11)
        low_rank_alone = result.method in ("lora", "without-rotation")
        assert len(norms) == 30
        assert norms.max() / norms.min() == pytest.approx(3 if low_rank_alone else 4, abs=0.5), result.method
        in_gradients = result.method in ("full", "lora-ga")
        assert in_gradients or low_rank_alone or norms.argmax() == 11, "of those that rotate"
        assert usual.max() / usual.min() == pytest.approx(4 if in_gradients else 3, abs=0.5), result.method


def test_rates_between_those_that_were_tried_promise_little_but_as_much_as_is_undecided(claim: Results) -> None:
    falls = {result.method: fall_between_rates(result) for result in claim.all}
    undecided = 0.0202
    shares = {"lora": 1, "lora-ga": 1.2, "hybrid": 0.5, "without-rotation": 0.25, "hybrid-constant": 0.125}
    assert {name: falls[name] / undecided for name in shares} == pytest.approx(shares, abs=0.07)


def test_what_the_low_rank_adds_is_not_significant(claim: Results) -> None:
    by_name = {result.method: result for result in claim.all}
    constant, alone = by_name["hybrid-constant"], by_name["without-low-rank"]
    compared: Any = compare_seeds(constant.values("validation loss"), alone.values("validation loss"))
    assert compared.difference == pytest.approx(-0.046, abs=5e-4) and compared.p == pytest.approx(0.09, abs=5e-3)


def test_at_the_hybrids_own_rate_the_rotation_alone_is_far_behind_and_most_of_that_is_the_rate(claim: Results) -> None:
    runs, differences = beside("without_low_rank", "without-low-rank", claim, "hybrid-constant")
    assert min(differences) > 0.2 and mean(differences) == pytest.approx(0.206, abs=5e-4)
    _, by_rate = beside("without_low_rank", "without-low-rank", claim, "without-low-rank")
    assert mean(by_rate) == pytest.approx(0.159, abs=5e-4)
    _, to_low_rank = beside("without_low_rank", "without-low-rank", claim, "without-rotation")
    assert mean(differences) - mean(to_low_rank) == pytest.approx(0.017, abs=5e-4)
    base = float(read_json(RECORDS / "claim" / "hf_peft" / "table.json")["rows"][0][2])
    alone = mean(record.validation_loss for record in runs.values())
    assert (base - alone) / (base - alone + mean(differences)) == pytest.approx(0.91, abs=0.01)


def test_norms_before_mixing_are_better_than_as_mixed_and_not_told_from_a_constant_lambda(claim: Results) -> None:
    runs, differences = beside("gradient_lambda", "hybrid-gradient", claim, "hybrid")
    assert max(differences) < 0 and mean(differences) == pytest.approx(-0.037, abs=5e-4)
    losses = [record.validation_loss for record in runs.values()]
    assert mean(losses) - mean(differences) == pytest.approx(1.427, abs=5e-4)
    assert ttest_rel(differences, [0] * 3).pvalue == pytest.approx(0.013, abs=5e-4)
    [ours], [literal] = read_results(RECORDS / "gradient_lambda").all, [r for r in claim.all if r.method == "hybrid"]
    assert tuned(ours)[4e-3] == pytest.approx(tuned(literal)[4e-3], abs=0.002)
    share = (fall_between_rates(literal) - fall_between_rates(ours)) / -mean(differences)
    assert share == pytest.approx(0.25, abs=0.02)
    for other, p in (("lora", 0.10), ("lora-ga", 0.18)):
        _, differences = beside("gradient_lambda", "hybrid-gradient", claim, other)
        assert ttest_rel(differences, [0] * 3).pvalue == pytest.approx(p, abs=5e-3)
    _, differences = beside("gradient_lambda", "hybrid-gradient", claim, "hybrid-constant")
    assert mean(differences) == pytest.approx(0.005, abs=5e-4)
    assert mean(losses) - mean(differences) == pytest.approx(1.385, abs=5e-4)
    assert ttest_rel(differences, [0] * 3).pvalue == pytest.approx(0.59, abs=5e-3)
    for record in runs.values():
        ends = [values[-1] for values in record.lambdas["by_layer"].values()]
        assert min(ends) >= 0.1 and max(ends) < 2 / 3 and mean(ends) == pytest.approx(0.295, abs=5e-4)


def test_all_forget_full_fine_tuning_least_and_of_28_pairs_one_is_told_apart() -> None:
    losses = {
        method: [record.test_loss for _, record in sorted(runs.items())]
        for method, runs in finals("forgetting").items()
    }
    base = float(read_json(RECORDS / "forgetting" / "hf_peft" / "table.json")["rows"][0][3])
    assert all(value > base for values in losses.values() for value in values)
    for seed in range(3):
        order = sorted(losses, key=lambda method: losses[method][seed])
        assert order[:2] == ["full", "oft"] and order[-1] == "lora-ga"
        assert all(losses["lora"][seed] < losses[name][seed] for name in ("boft", "urnn", "hybrid", "hybrid-constant"))
    pairs = [*combinations(losses, 2)]
    corrected = holm([ttest_rel(losses[one], losses[other]).pvalue for one, other in pairs])
    assert len(pairs) == 28
    assert [{*pair} for pair, p in zip(pairs, corrected, strict=True) if p < 0.05] == [{"full", "boft"}]


@pytest.mark.parametrize("folder", [RECORDS / name / "hf_peft" for name in ("claim", "forgetting")])
def test_the_table_beside_hf_peft_is_of_its_runs_and_of_the_cells(folder: Path) -> None:
    runs = [read_json(path) for path in folder.glob("*,*.json")]
    rows = {(row[0].split()[-1], row[1]): row for row in read_json(folder / "table.json")["rows"]}
    assert len(runs) == len(rows)
    for run in runs:
        assert run.pop("sha256") == json_digest(run)
        cell = read_file(folder.parent / "cells" / f"{run['cell']}.json")
        name = {"base": "model", "lora": "LoRA", "oft": "OFT"}[run["method"]]
        row = rows[name, "" if name == "model" else run["cell"].split(",", 2)[-1].replace(",", " ")]
        values = (run["validation_loss"], ".4f"), (run["test_loss"], ".4f"), (run.get("bleu"), ".2f")
        assert row[2:5] == ["" if value is None else format(value, form) for value, form in values]
        assert row[5] in ("", f"{cell.validation_loss:.4f}")
        if name == "LoRA":
            curves = zip(run["losses"], (loss for _, _, loss in cell.curves["loss"]), strict=True)
            most = max(abs(ours - theirs) for ours, theirs in curves)
            assert most < 1e-4 and row[6] == f"{most:.1e}, 120 steps within 1e-4"


def test_ten_epochs_are_learnt_by_heart_and_go_too_far() -> None:
    first_norms = {}
    for method, runs in finals("ten_epochs").items():
        for record in runs.values():
            losses = [loss for _, _, loss in record.curves["validation_loss"]]
            best = losses.index(min(losses))
            assert len(losses) == 10 and best < 2 and losses[-1] > losses[best]
            assert mean(loss for _, _, loss in record.curves["loss"][-7:]) < 0.1
            norms = [norm for _, _, norm in record.curves["grad_norm"]]
            assert norms[-1] < norms[0] / 5
        first_norms[method] = mean(record.curves["grad_norm"][0][2] for record in runs.values())
    order = sorted(first_norms, key=first_norms.__getitem__)
    assert {*order[:2]} == {"lora", "urnn"} and order[-1] == "boft"
