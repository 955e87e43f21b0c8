"""Which runs of an experiment count, how a method's differ from another's, and tables of them in several formats."""

import math
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron_peft.config import ConfigurationError
from megatron_peft.experiment import report, tables
from megatron_peft.experiment.contrasts import compare
from megatron_peft.experiment.records import cell_file, of_cell, read_records, write_record
from megatron_peft.experiment.results import Results, copy_results, read_results
from megatron_peft.experiment.tables import (
    crossing,
    format_number,
    format_p,
    make_table,
    reference_method,
    score_runs,
    steps_to,
    with_spread,
)
from tests.experiment import small_results
from tests.experiment.small_experiment import content, experiment
from tests.experiment.small_results import METHODS, as_the_paper, record_of, results, write_cells

CELL = "cells/tiny,talk,lora,lr=0.1,seed=1.json"


def test_a_run_that_failed_is_left_out(found: Results, tmp_path: Path) -> None:
    cell = found.all[0].group.finals[1][2]
    write_record(tmp_path, of_cell(cell, "failed", reason="killed"))
    again = read_results(tmp_path)
    assert [[*result.finals] for result in again.all] == [[1, 2], [1, 2, 3], [1, 2, 3]]


def test_of_a_grid_with_a_point_that_failed_the_rest_counts(found: Results, tmp_path: Path) -> None:
    """As in the runner, which goes on without it."""
    cell = found.all[0].group.tuning[0]
    write_record(tmp_path, of_cell(cell, "failed", reason="killed"))
    again = read_results(tmp_path)
    assert [[*result.finals] for result in again.all] == [[1, 2, 3]] * 3 and cell not in again.all[0].untried
    cell_file(tmp_path, cell).unlink()
    assert cell in read_results(tmp_path).all[0].untried


@pytest.mark.parametrize("status", ["failed", None])
@pytest.mark.parametrize("rates", [pytest.param(["0.4"], id="no grid"), pytest.param(["0.4", "0.1"], id="grid")])
def test_final_runs_are_reported_whatever_came_of_the_grid(tmp_path: Path, rates: list[str], status) -> None:
    """A point that failed, or has no record since it could not be started or is to be repeated."""
    write_cells(tmp_path, methods={"lora": {"grid": {"lr": rates}}}, tuning_seed=3, seeds=[1, 2])
    for cell in read_results(tmp_path).all[0].group.tuning[: len(rates)]:
        cell_file(tmp_path, cell).unlink()
        if status:
            write_record(tmp_path, of_cell(cell, status, reason="killed"))
    (again,) = read_results(tmp_path).all
    assert [*again.finals] == [1, 2] and again.chosen[0].settings == {"lr": "0.4"}


def test_a_missing_experiment_and_a_folder_without_its_cells_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="experiment.yaml is not there: .* with --experiment"):
        read_results(tmp_path)
    (tmp_path / "experiment.yaml").write_text(experiment(tmp_path)[0].text)
    with pytest.raises(ConfigurationError, match="contains no results of .*: run megatron-peft experiment first"):
        read_results(tmp_path)


@pytest.mark.parametrize(
    ("name", "old", "new", "told"),
    [
        ("experiment.yaml", "train-iters: 2", "train-iters: 3", "--train-iters is 2 and 3 in the file"),
        ("experiment.yaml", "train-iters: 2", "bf16: true", "--bf16 is absent and given in the file"),
        ("experiment.yaml", "acc,none", "f1,none", "its score was produced by another command or of other numbers"),
        (CELL, '"processes": 1', '"processes": 2', "processes is 2 and 1 in the file"),
    ],
)
def test_record_that_is_not_of_the_files_words_is_refused(
    tmp_path: Path, name: str, old: str, new: str, told: str
) -> None:
    path = write_cells(tmp_path) / name
    text = path.read_text()
    path.write_text(text.replace(old, new, 1))
    assert path.read_text() != text
    with pytest.raises(ConfigurationError, match=f"json does not belong to .*experiment.yaml: {told}.*. Remove it"):
        read_results(tmp_path)


def test_named_experiment_file_goes_before_the_copy_in_the_folder(tmp_path: Path) -> None:
    other = tmp_path / "other.yaml"
    other.write_text((write_cells(tmp_path) / "experiment.yaml").read_text().replace("title: Small", "title: Other"))
    assert [read_results(tmp_path, file).experiment.title for file in (None, other)] == ["Small", "Other"]


def test_records_fit_a_file_that_gained_a_method(tmp_path: Path) -> None:
    path = write_cells(tmp_path) / "experiment.yaml"
    path.write_text(path.read_text().replace("methods:", "methods:\n  boft: {grid: {lr: [0.1, 0.4]}}"))
    assert report.state(read_results(tmp_path)).startswith("**Not finished:** 9 of 12 final runs are in")


def test_cells_without_a_commit_are_named_and_copied_unchanged(found: Results, tmp_path: Path) -> None:
    lora, lora_ga, _ = (result.group.tuning for result in found.all)
    write_record(tmp_path, replace(record_of(lora[1]), versions={}))
    again = read_results(tmp_path)
    assert report.provenance(again) == f"**1 of 12 cells do not record their commit:** {lora[1].key}."
    copy_results(again, tmp_path / "copy")
    assert read_records(tmp_path / "copy") == again.records() and not (tmp_path / "copy" / "cells").exists()


def test_cells_that_read_other_data_are_refused(found: Results, tmp_path: Path) -> None:
    lora, lora_ga, _ = (result.group.tuning for result in found.all)
    for cell, digit in ((lora[0], "a"), (lora_ga[1], "b")):
        write_record(tmp_path, record_of(cell, data={"train.jsonl": digit * 64}))
    with pytest.raises(ConfigurationError, match=f"train.jsonl was not the same .*bbb for {lora_ga[1].key}. Remove"):
        read_results(tmp_path)


@pytest.mark.parametrize(
    ("loss", "step"), [(2.5, (15, False)), (1.5, (30, False)), (1.0, (40, False)), (0.9, None), (3.0, (10, False))]
)
def test_crossing_lies_on_the_line_between_measurements(loss: float, step: tuple[float, bool] | None) -> None:
    curve = {10: 3.0, 20: 2.0, 40: 1.0, 60: 1.5}
    assert crossing(curve, loss) == step
    assert crossing(curve, 3.5) == (10, True), "some step before the first measurement"


def runs(**losses: list[float]) -> Any:
    """Of seeds, as `s1`."""
    curves = {seed: [[10 * at, at / 10, loss] for at, loss in enumerate(of, 1)] for seed, of in losses.items()}
    return SimpleNamespace(
        finals={seed: SimpleNamespace(curves={"validation_loss": curve}) for seed, curve in curves.items()}
    )


def test_half_the_steps_are_two_times_fewer_seed_by_seed(found: Results) -> None:
    assert steps_to(runs(s1=[3, 1, 0.5, 0.2]), runs(s1=[4, 3, 2, 1])) == {
        **{10: "≥ 1.00", 20: "2.00", 30: "2.00", 40: "2.00"}
    }
    paired = steps_to(runs(s1=[3, 1], s2=[9, 9], s7=[0, 0]), runs(s1=[4, 2], s2=[4, 2]))
    assert paired[20] == "1/2 reach it", "one of two never arrives"
    assert steps_to(runs(s1=[9, 9]), runs(s1=[4, 2])) == dict.fromkeys((10, 20), "not reached (0/1)")
    assert steps_to(runs(s1=[1]), runs(s2=[1])) == {}
    early = steps_to(runs(s1=[1, 1], s2=[9, 2]), runs(s1=[4, 2], s2=[4, 2]))
    assert early[20] == "≥ 1.33", "one of two had it at its first measurement"
    rising = steps_to(runs(s1=[3, 1, 1, 1]), runs(s1=[3, 2, 2, 2.5], s2=[0, 0, 0, 0]))
    assert [*rising] == [10, 20], "a loss that every run had before is no goal"
    lora = found.all[0]
    assert steps_to(lora, lora) == {10: "1.00", 20: "1.00", 40: "1.00"}


def test_difference_and_statistic_are_those_of_the_pairs() -> None:
    """t = mean(d) / (sd(d) / sqrt(n)); the 97.5% point of t with two degrees of freedom is 4.303."""
    differences = np.random.default_rng(1).normal(0, 1, 3)
    found = compare(differences)
    assert found is not None and found.difference == pytest.approx(mean(differences))
    half = 4.30265 * stdev(differences) / math.sqrt(3)
    assert (found.low, found.high) == pytest.approx((mean(differences) - half, mean(differences) + half), rel=1e-4)
    assert (found.p < 0.05) == (abs(found.difference) > half)
    assert compare(np.array([1.0])) is None, "one pair"
    assert compare(np.array([0.5, 0.5])) is None, "no spread"


def test_pairs_are_of_the_same_seed_and_seeds_of_one_alone_are_left_out(tmp_path: Path) -> None:
    write_cells(tmp_path, seeds=[1, 2, 3])
    for path in (tmp_path / "cells").glob("*lora,lr=0.4,seed=1.json"):
        path.unlink()
    scores = score_runs(read_results(tmp_path), "hybrid")["tiny", "talk", "validation loss"]
    assert scores["difference"]["lora"] == pytest.approx(mean([2.04 - 1.62, 2.12 - 1.66])), "of two pairs"


CELLS = (("x|y", "**1.5**", "2_0"), ("", "±", "–"), ("a\\b {x}", "", "1 ≥ 0"))
TABLE = make_table("A & B", ("what", "one", "two"), CELLS, note="100% sure")


def test_markdown_escapes_bars_and_csv_has_no_marks() -> None:
    lines = TABLE.markdown().splitlines()
    assert lines[0] == "**A & B**" and lines[-1] == "100% sure"
    assert lines[2:5] == ["| what | one | two |", "| --- | ---: | ---: |", "| x\\|y | **1.5** | 2_0 |"]
    assert TABLE.csv().splitlines() == ["what,one,two", "x|y,1.5,2_0", ",±,–", "a\\b {x},,1 ≥ 0"]


def test_latex_is_escaped_and_has_all_columns() -> None:
    text = TABLE.latex()
    rows = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert [row.replace(r"\&", "").count("&") for row in rows] == [2] * 4
    assert rows[1] == r"x|y & \textbf{1.5} & 2\_0 \\" and rows[2] == r" & $\pm$ & -- \\"
    assert rows[3] == r"a\textbackslash b \{x\} &  & 1 $\ge$ 0 \\", "escaped once"
    assert r"\caption{A \& B. 100\% sure}" in text and r"\begin{tabular}{lrr}" in text


def test_numbers_have_four_digits_or_so() -> None:
    texts = {1.70449: "1.704", 20.13: "20.13", 192.55: "192.6", None: "–", -0.5: "-0.500"}
    assert {value: format_number(value) for value in texts} == texts
    assert format_number(0.25, signed=True) == "+0.250"
    probabilities = {0.0: "< 0.001", 0.00099: "< 0.001", 0.001: "0.001", 1.0: "1.000", None: "–"}
    assert {p: format_p(p) for p in probabilities} == probabilities
    assert (with_spread(14.53, 1.38), with_spread(1.7, math.nan), with_spread(math.nan, math.nan)) == (
        "14.53 ± 1.38",
        "1.700",
        "–",
    )


def test_mean_spread_and_test_are_of_the_three_runs(found: Results) -> None:
    scores = score_runs(found, "hybrid")["tiny", "talk", "validation loss"]
    lora = scores.loc["lora"]
    assert [*lora[[1, 2, 3]]] == pytest.approx([2.02, 2.04, 2.12]) and lora["mean"] == pytest.approx(2.06)
    assert lora["sd"] == pytest.approx(0.05292, rel=1e-3)  # n - 1
    assert lora["difference"] == pytest.approx(0.43)
    assert math.isnan(scores["p"]["lora-ga"]), "its runs differ from the Hybrid's by the same each: no spread, no test"
    assert math.isnan(scores["p"]["hybrid"])
    assert reference_method(found, None) == "hybrid" and reference_method(found, "lora") == "lora"


@pytest.mark.parametrize(
    ("names", "reference"),
    [(("lora", "half", "hybrid"), "hybrid"), (("lora", "half", "paper"), "half"), (("urnn", "lora"), "urnn")],
)
def test_others_are_tested_against_the_hybrid_of_that_name_wherever_it_stands(names, reference) -> None:
    of: Any = SimpleNamespace
    methods = [of(name=name, peft_method=name if name in ("lora", "urnn") else "hybrid") for name in names]
    assert reference_method(of(experiment=of(methods=methods)), None) == reference


def test_paper_names_are_held_against_the_paper(tmp_path: Path) -> None:
    report.check_names(as_the_paper(tmp_path))
    models = {"tiny": {**content()["models"]["tiny"], "paper": "GPT-2"}}
    with pytest.raises(ConfigurationError, match="models.tiny.paper is 'GPT-2'; the paper has Llama3.1-405B, "):
        report.check_names(as_the_paper(tmp_path, models=models))


def test_averages_of_the_paper_are_those_of_its_table_and_daggers_mark_the_wrong_ones() -> None:
    averages = report.printed_averages()
    assert averages.loc[("GLUE", "Hybrid"), "Llama3.1-405B"] == "92.3"
    assert averages.loc[("HumanEval", "Hybrid"), "Llama3.1-405B"] == "62.5 / 77.8"
    assert averages.loc[("HumanEval", "Hybrid"), "Llama3.3-70B"] == "–" and averages.size == 4 * 6 * 4
    table1, wrong, *_ = report.papers_tables()
    marked, count = [], 0
    for runs, averages in zip(table1.frame.values[::2], table1.frame.values[1::2], strict=True):
        for three_runs, average in zip(runs[2:], averages[2:], strict=True):
            means = average.split(" / ") if average != "–" else []
            values = [float(run) for run in three_runs.split(" / ")] if means else []
            for at, text in enumerate(means):
                mean_of_runs = mean(values[3 * at : 3 * at + 3])
                is_off = abs(mean_of_runs - float(text.removesuffix("†"))) > 0.05 + 1e-9
                assert is_off == text.endswith("†")
                marked += [f"{mean_of_runs:.2f}"] if is_off else []
                count += 1
    assert sorted(marked) == sorted(row[4] for row in wrong.frame.values)
    assert wrong.title.startswith(f"{len(marked)} of the paper's {count} averages")


def test_loss_that_is_never_reached_is_told_and_without_lora_there_is_no_table(tmp_path: Path, monkeypatch) -> None:
    assert tables.speed_table(results(tmp_path, methods={"hybrid": METHODS["hybrid"]}), "tiny", "talk") is None
    methods = {"lora": METHODS["lora"], "slow": {"flags": {"peft-method": "boft"}, "grid": {"lr": [0.1, 0.4]}}}
    monkeypatch.setitem(small_results.LOSSES, "slow", 9.0)
    monkeypatch.setitem(small_results.BETTER, "slow", "0.4")
    speeds = tables.speed_table(results(tmp_path, methods=methods), "tiny", "talk")
    assert speeds is not None and [*speeds.frame.iloc[0, 1:]] == ["not reached (0/3)"] * 3
