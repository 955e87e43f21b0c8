"""Which runs of an experiment count, how a method's differ from another's, and tables of them in several formats."""

import json
import math
import random
from pathlib import Path
from statistics import mean, stdev
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_peft.config import ConfigurationError
from megatron_peft.experiment import report, tables
from megatron_peft.experiment.cell_record import CellRecord, cell_file, json_digest, of_cell, source_of, write_record
from megatron_peft.experiment.results import (
    Results,
    StepsTo,
    compare_seeds,
    copy_results,
    crossing,
    read_results,
    steps_to,
)
from megatron_peft.experiment.tables import Table, format_number, format_p, reference_method, rows, with_spread
from tests.experiment import small_results
from tests.experiment.small_experiment import content, experiment
from tests.experiment.small_results import METHODS, as_the_paper, record_of, results, write_cells

CELL = "cells/tiny,talk,lora,lr=0.1,seed=1.json"


def test_a_run_that_failed_is_left_out(found: Results, tmp_path: Path) -> None:
    cell = found.all[0].group.finals[1][2]
    write_record(tmp_path, cell, of_cell(cell, "failed", reason="killed"))
    again = read_results(tmp_path)
    assert [[*result.finals] for result in again.all] == [[1, 2], [1, 2, 3], [1, 2, 3]]


def test_of_a_grid_with_a_point_that_failed_the_rest_counts(found: Results, tmp_path: Path) -> None:
    """As in the runner, which goes on without it."""
    cell = found.all[0].group.tuning[0]
    write_record(tmp_path, cell, of_cell(cell, "failed", reason="killed"))
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
            write_record(tmp_path, cell, of_cell(cell, status, reason="killed"))
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
        ("experiment.yaml", "acc,none", "f1,none", "its score was produced from a different entry than the file's"),
        (CELL, '"lora"', '"boft"', "method is 'boft' and 'lora' in the file"),  # moved under another name
        (CELL, '"lr": "0.1"', '"lr": "0.4"', "settings is {'lr': '0.4'} and {'lr': '0.1'} in the file"),
        (CELL, '"cell_sha256": "', '"cell_sha256": "x', "its training was produced from a different entry"),
    ],
)
def test_record_that_is_not_of_the_files_words_is_refused(
    tmp_path: Path, name: str, old: str, new: str, told: str
) -> None:
    path = write_cells(tmp_path) / name
    text = path.read_text()
    path.write_text(text.replace(old, new, 1))
    assert path.read_text() != text
    if name == CELL:  # somebody has made a digest for it too
        values = json.loads(path.read_text()) | {"sha256": None}
        values["sha256"] = json_digest({key: value for key, value in values.items() if key != "sha256"})
        path.write_text(json.dumps(values))
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


def test_cells_without_provenance_are_named_and_copied_unchanged(found: Results, tmp_path: Path) -> None:
    lora, lora_ga, hybrid = (result.group.tuning for result in found.all)
    for cell in (lora[0], lora[1], lora_ga[1]):  # the second has a score of nowhere
        training = source_of("", cell) | {"data_sha256": {"train.jsonl": "a" * 64}}
        write_record(tmp_path, cell, record_of(cell, provenance={"training": training}))
    write_record(tmp_path, hybrid[0], record_of(hybrid[0]))
    silent, names = report.provenance(read_results(tmp_path))
    assert silent.startswith("**2 of 12 cells have no digests")
    assert names == f"They are {lora[1].key}; {hybrid[0].key}."
    copy_results(read_results(tmp_path), tmp_path / "copy")
    copied, old = (cell_file(folder, hybrid[0]).read_text() for folder in (tmp_path / "copy", tmp_path))
    assert copied == old and "provenance" not in copied
    other = source_of("", lora_ga[1]) | {"data_sha256": {"train.jsonl": "b" * 64}}
    write_record(tmp_path, lora_ga[1], record_of(lora_ga[1], provenance={"training": other}))
    with pytest.raises(ConfigurationError, match=f"train.jsonl was not the same .*bbb for {lora_ga[1].key}. Remove"):
        read_results(tmp_path)


@pytest.mark.parametrize(
    ("loss", "step"), [(2.5, (15, False)), (1.5, (30, False)), (1.0, (40, False)), (0.9, None), (3.0, (10, False))]
)
def test_crossing_lies_on_the_line_between_measurements(loss: float, step: tuple[float, bool] | None) -> None:
    curve = [(10, 3.0), (20, 2.0), (40, 1.0), (60, 1.5)]
    assert crossing(curve, loss) == step
    assert crossing(curve, 3.5) == (10, True), "some step before the first measurement"


def run(*losses: float) -> CellRecord:
    curve = [[10 * at, at / 10, loss] for at, loss in enumerate(losses, start=1)]
    return CellRecord("m", "t", "x", {}, 1, (), 1, "trained", curves={"validation_loss": curve})


def test_half_the_steps_are_two_times_fewer_seed_by_seed(found: Results) -> None:
    at_10, at_20, _, at_40 = steps_to({1: run(3, 1, 0.5, 0.2)}, {1: run(4, 3, 2, 1)})
    assert at_10 == StepsTo(10, 1.0, True, 1, 1)
    assert (at_20, at_40) == (StepsTo(20, 2.0, False, 1, 1), StepsTo(40, 2.0, False, 1, 1))
    paired = steps_to({1: run(3, 1), 2: run(9, 9), 7: run(0, 0)}, {1: run(4, 2), 2: run(4, 2)})
    assert paired[-1] == StepsTo(20, 20 / 15, False, 1, 2), "one of two never arrives"
    assert str(paired[-1]) == "1/2 reach it" and str(at_40) == "2.00" and str(at_10) == "≥ 1.00"
    assert steps_to({1: run(1)}, {2: run(1)}) == []
    early = steps_to({1: run(1, 1), 2: run(9, 2)}, {1: run(4, 2), 2: run(4, 2)})
    assert early[-1] == StepsTo(20, 20 / 15, True, 2, 2), "one of two had it at its first measurement"
    rising = steps_to({1: run(3, 1, 1, 1)}, {1: run(3, 2, 2, 2.5), 2: run(0, 0, 0, 0)})
    assert [at.steps for at in rising] == [10, 20], "a loss that every run had before is no goal"
    lora = found.all[0].finals
    assert [(one.steps, one.times_fewer) for one in steps_to(lora, lora)] == [(10, 1), (20, 1), (40, 1)]


def test_difference_and_statistic_are_those_of_the_pairs() -> None:
    """t = mean(d) / (sd(d) / sqrt(n)); the 97.5% point of t with two degrees of freedom is 4.303."""
    random.seed(1)
    ours, theirs = ({seed: random.gauss(0, 1) for seed in (1, 2, 3)} for _ in range(2))
    differences = [ours[seed] - theirs[seed] for seed in (1, 2, 3)]
    found = compare_seeds(ours, theirs)
    assert found is not None and found.difference == pytest.approx(mean(differences))
    half = 4.30265 * stdev(differences) / math.sqrt(3)
    assert (found.low, found.high) == pytest.approx((mean(differences) - half, mean(differences) + half), rel=1e-4)
    assert (found.p < 0.05) == (abs(found.difference) > half)


def test_pairs_are_of_the_same_seed_and_seeds_of_one_alone_are_left_out() -> None:
    """A large spread over seeds that both share does not hide a small difference."""
    found = compare_seeds({1: 10.1, 2: 20.11, 3: 30.09}, {1: 10.0, 2: 20.0, 3: 30.0})
    assert found is not None and found.p < 0.01
    found = compare_seeds({1: 1.0, 2: 3.0, 5: 100.0}, {1: 0.0, 2: 1.0, 3: 7.0})
    assert found is not None and found.difference == 1.5, "the mean of two"
    assert compare_seeds({1: 1.0}, {1: 2.0}) is None, "one pair"
    assert compare_seeds({1: 1.0, 2: 2.0}, {3: 1.0, 4: 2.0}) is None, "no pair"
    assert compare_seeds({1: 1.0, 2: 2.0}, {1: 0.5, 2: 1.5}) is None, "no spread"


CELLS = (("x|y", "*1.5", "2_0"), ("", "±", "–"), ("a\\b {x}", "", "1 ≥ 0"))
TABLE = Table("A & B", ("what", "one", "two"), CELLS, note="100% sure")


def test_markdown_escapes_bars_and_csv_has_no_marks() -> None:
    lines = TABLE.markdown().splitlines()
    assert lines[0] == "**A & B**" and lines[-1] == "100% sure"
    assert lines[2:5] == ["| what | one | two |", "| --- | ---: | ---: |", "| x\\|y | **1.5** | 2_0 |"]
    assert TABLE.csv().splitlines() == ["what,one,two", "x|y,1.5,2_0", ",±,–", "a\\b {x},,1 ≥ 0"]


def test_latex_is_escaped_and_has_all_columns_and_rules_between_groups() -> None:
    text = TABLE.latex()
    rows = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert [row.replace(r"\&", "").count("&") for row in rows] == [2] * 4
    assert rows[1] == r"x|y & \textbf{1.5} & 2\_0 \\" and rows[2] == r" & $\pm$ & -- \\"
    assert rows[3] == r"a\textbackslash{}b \{x\} &  & 1 $\ge$ 0 \\", "escaped once"
    assert r"\caption{A \& B. 100\% sure}" in text and r"\begin{tabular}{lrr}" in text
    lines = Table("t", ("a", "b"), (("x", "1"), ("", "2"), ("y", "3"))).latex().splitlines()[4:-2]
    assert " ".join(lines) == r"\hline a & b \\ \hline x & 1 \\  & 2 \\ \hline y & 3 \\ \hline"


def test_numbers_have_four_digits_or_so() -> None:
    texts = {1.70449: "1.704", 20.13: "20.13", 192.55: "192.6", None: "–", -0.5: "-0.500"}
    assert {value: format_number(value) for value in texts} == texts
    assert format_number(0.25, signed=True) == "+0.250"
    probabilities = {0.0: "< 0.001", 0.00099: "< 0.001", 0.001: "0.001", 1.0: "1.000", None: "–"}
    assert {p: format_p(p) for p in probabilities} == probabilities
    assert (with_spread(14.53, 1.38), with_spread(1.7, None), with_spread(None, None)) == ("14.53 ± 1.38", "1.700", "–")


def test_mean_spread_and_test_are_of_the_three_runs(found: Results) -> None:
    lora, lora_ga, hybrid = rows(found, "hybrid")[:3]
    assert lora.runs == pytest.approx((2.02, 2.04, 2.12)) and lora.mean == pytest.approx(2.06)
    assert lora.deviation == pytest.approx(0.05292, rel=1e-3)  # n - 1
    assert lora.against is not None and lora.against.difference == pytest.approx(0.43)
    assert lora_ga.against is None, "its runs differ from the Hybrid's by the same each: no spread, no test"
    assert hybrid.against is None
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
    assert averages["GLUE", "Hybrid", "Llama3.1-405B"] == "92.3"
    assert averages["HumanEval", "Hybrid", "Llama3.1-405B"] == "62.5 / 77.8"
    assert averages["HumanEval", "Hybrid", "Llama3.3-70B"] == "–" and len(averages) == 4 * 6 * 4
    table1, wrong, *_ = report.papers_tables()
    marked, count = [], 0
    for runs, averages in zip(table1.rows[::2], table1.rows[1::2], strict=True):
        for three_runs, average in zip(runs[2:], averages[2:], strict=True):
            means = average.split(" / ") if average != "–" else []
            values = [float(run) for run in three_runs.split(" / ")] if means else []
            for at, text in enumerate(means):
                mean_of_runs = mean(values[3 * at : 3 * at + 3])
                is_off = abs(mean_of_runs - float(text.removesuffix("†"))) > 0.05 + 1e-9
                assert is_off == text.endswith("†")
                marked += [f"{mean_of_runs:.2f}"] if is_off else []
                count += 1
    assert sorted(marked) == sorted(row[4] for row in wrong.rows)
    assert wrong.title.startswith(f"{len(marked)} of the paper's {count} averages")


def test_loss_that_is_never_reached_is_told_and_without_lora_there_is_no_table(tmp_path: Path, monkeypatch) -> None:
    assert tables.speed_table(results(tmp_path, methods={"hybrid": METHODS["hybrid"]}), "tiny", "talk") is None
    methods = {"lora": METHODS["lora"], "slow": {"flags": {"peft-method": "boft"}, "grid": {"lr": [0.1, 0.4]}}}
    monkeypatch.setitem(small_results.LOSSES, "slow", 9.0)
    monkeypatch.setitem(small_results.BETTER, "slow", "0.4")
    speeds = tables.speed_table(results(tmp_path, methods=methods), "tiny", "talk")
    assert speeds is not None and speeds.rows[0][1:] == ("not reached (0/3)",) * 3
