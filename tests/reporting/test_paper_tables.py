from __future__ import annotations

from pathlib import Path

from megatron_peft.reporting import paper_tables
from megatron_peft.reporting.table1 import rows
from tests.reporting.small_results import results
from tests.reporting.test_table1 import as_the_paper


def test_table1_is_as_printed_and_marks_wrong_averages() -> None:
    found = paper_tables.table1().rows
    assert len(found) == 2 * 6 * 4
    assert found[10:12] == (
        ("", "Hybrid", "91.7 / 93.1 / 92.1", "89.8 / 90.3 / 90.4", "87.9 / 88.6 / 88.7", "84.6 / 85.2 / 85.4"),
        ("", "Avg", "92.3", "90.2", "88.4", "85.1"),
    )
    assert found[-1] == ("", "Avg", "62.5 / 77.8", "–", "53.5 / 70.1†", "40.5 / 58.3†")


def test_wrong_averages_are_told_with_the_mean_of_their_runs() -> None:
    table = paper_tables.wrong_averages()
    assert table.title.startswith("8 of the paper's 108 averages are not the mean")
    assert ("MT-Bench", "LoRA-GA", "Llama3.3-70B", "27.2 / 27.8 / 27.7", "27.57", "27.7") in table.rows


def test_ours_stand_beside_the_benchmark_that_the_task_names(tmp_path: Path) -> None:
    (table,) = paper_tables.beside_ours(rows(as_the_paper(tmp_path), "hybrid"))
    assert table.columns[:3] == ("method", "ours: tiny", "paper: Llama3.1-405B")
    assert table.rows[0] == ("lora", "79.40", "91.3", "89.1", "87.5", "84.0")


def test_tasks_that_are_not_the_papers_have_no_such_table(tmp_path: Path) -> None:
    assert paper_tables.beside_ours(rows(results(tmp_path), "hybrid")) == []


def test_figures_of_the_paper_are_its_text() -> None:
    assert ("Llama3.1-405B", "Hybrid", "55", "30") in paper_tables.resources().rows
    assert ("Wizard-Vicuna-30B", "BOFT, uRNN", "validation loss final range", "0.94 to 1.00") in (
        paper_tables.dynamics().rows
    )
