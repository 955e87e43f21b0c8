from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_peft.config import ConfigurationError
from megatron_peft.reporting.results import Results
from megatron_peft.reporting.table1 import check_paper_names, in_the_papers_form, reference_method, rows, with_test
from tests.experiment.small_experiment import content
from tests.reporting.small_results import METHODS, results


def as_the_paper(folder: Path, **changes: Any) -> Results:
    tasks = {"talk": {**content()["tasks"]["talk"], "paper": "GLUE"}}
    models = {"tiny": {**content()["models"]["tiny"], "paper": "BloomZ-7B1"}}
    return results(folder, **{"tasks": tasks, "models": models, **changes})


def test_mean_spread_and_test_are_of_the_three_runs(tmp_path: Path) -> None:
    lora, lora_ga, hybrid = rows(results(tmp_path), "hybrid")[:3]
    assert lora.runs == pytest.approx((2.02, 2.04, 2.12)) and lora.mean == pytest.approx(2.06)
    assert lora.deviation == pytest.approx(0.05292, rel=1e-3)  # n - 1
    assert lora.against is not None and lora.against.difference == pytest.approx(0.43)
    assert lora_ga.against is None, "its runs differ from the Hybrid's by the same each: no spread, no test"
    assert hybrid.against is None


def test_lower_losses_and_higher_scores_are_the_best(tmp_path: Path) -> None:
    found = rows(results(tmp_path), "hybrid")
    assert {(row.metric, row.result.method) for row in found if row.is_best} == {
        ("validation loss", "lora-ga"),
        ("accuracy", "lora-ga"),
    }


def test_papers_form_has_runs_then_average(tmp_path: Path) -> None:
    found = results(tmp_path)
    table = in_the_papers_form(found, rows(found, "hybrid"))
    assert table.columns == ("Benchmark", "Method", "tiny")
    assert table.rows[0] == ("talk (validation loss)", "lora", "2.020 / 2.040 / 2.120")
    assert table.rows[1] == ("", "Avg", "2.060 ± 0.053")
    assert table.rows[3] == ("", "Avg", "*1.530 ± 0.026")
    assert table.rows[6][0] == "talk (accuracy)" and len(table.rows) == 12


def test_tested_table_has_a_line_a_row(tmp_path: Path) -> None:
    found = results(tmp_path)
    table = with_test(rows(found, "hybrid"), "hybrid", 3)
    assert len(table.rows) == 6
    line = dict(zip(table.columns, table.rows[0], strict=True))
    assert (line["run 3"], line["minus hybrid"], line["paper's average"]) == ("2.120", "+0.430", "–")


def test_papers_entry_stands_beside_the_first_score_only(tmp_path: Path) -> None:
    printed = {(row.metric, row.result.method): row.printed for row in rows(as_the_paper(tmp_path), "hybrid")}
    hybrid = printed["accuracy", "hybrid"]
    assert hybrid is not None and hybrid.average == 85.1
    assert printed["validation loss", "hybrid"] is None


def test_variants_of_a_method_are_not_the_papers(tmp_path: Path) -> None:
    methods = {**METHODS, "other": {"flags": {"peft-method": "hybrid"}, "grid": {"lr": [1, 2]}}}
    del methods["hybrid"]
    found = as_the_paper(tmp_path, methods={name: methods[name] for name in ("lora", "lora-ga")})
    assert [row.printed and row.printed.average for row in rows(found, "lora")[2:]] == [84.0, 84.4]


def test_reference_is_the_hybrid_or_the_one_asked_for(tmp_path: Path) -> None:
    found = results(tmp_path)
    assert reference_method(found, None) == "hybrid" and reference_method(found, "lora") == "lora"
    with pytest.raises(ConfigurationError, match="--against lorra: the experiment's methods are lora, lora-ga, hybrid"):
        reference_method(found, "lorra")


def test_paper_names_are_held_against_the_paper(tmp_path: Path) -> None:
    check_paper_names(as_the_paper(tmp_path))
    models = {"tiny": {**content()["models"]["tiny"], "paper": "GPT-2"}}
    with pytest.raises(ConfigurationError, match="models.tiny.paper is 'GPT-2'; the paper has Llama3.1-405B, "):
        check_paper_names(as_the_paper(tmp_path, models=models))
