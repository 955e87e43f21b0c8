from __future__ import annotations

from megatron_peft.reporting.paper import Entry, benchmarks, entries, entry, models, paper, wrong_averages

FAR_OFF = {  # by more than 0.1, whichever way one rounds
    ("MT-Bench", "LoRA-GA", "Llama3.3-70B", "", 27.7),
    ("HumanEval", "LoRA", "BloomZ-7B1", "pass@10", 57.3),
    ("HumanEval", "Hybrid", "Wizard-Vicuna-30B", "pass@10", 70.1),
}


def place(found: Entry) -> tuple[str, str, str, str, float]:
    return found.benchmark, found.method, found.model, found.metric, found.average


def test_table_is_whole() -> None:
    """Six methods, four models, three benchmarks of one number, and one of two without the 70B model."""
    assert len(entries()) == 6 * (4 * 3 + 3 * 2)
    assert all(len(found.runs) == 3 for found in entries())
    assert list(benchmarks()) == ["GLUE", "GSM8K", "MT-Bench", "HumanEval"] and len(models()) == 4


def test_entries_are_found_by_their_place() -> None:
    hybrid = entry("GLUE", "Hybrid", "Llama3.1-405B")
    assert hybrid is not None and (hybrid.runs, hybrid.average) == ((91.7, 93.1, 92.1), 92.3)
    drawn = entry("HumanEval", "Hybrid", "Llama3.1-405B", "pass@10")
    assert drawn is not None and drawn.average == 77.8
    assert entry("HumanEval", "Hybrid", "Llama3.1-405B") is None
    assert entry("HumanEval", "Hybrid", "Llama3.3-70B", "pass@1") is None
    assert entry(None, "Hybrid", "Llama3.1-405B") is None


def test_averages_that_are_not_of_their_runs_are_found() -> None:
    wrong = wrong_averages()
    assert len(wrong) == 8
    assert {place(one) for one in wrong if abs(one.mean_of_runs - one.average) > 0.101} == FAR_OFF


def test_average_may_be_rounded_either_way() -> None:
    assert Entry("b", "m", "x", "", (1.0, 1.1, 1.05), 1.0).average_is_of_runs
    assert Entry("b", "m", "x", "", (1.0, 1.1, 1.05), 1.1).average_is_of_runs
    assert not Entry("b", "m", "x", "", (1.0, 1.1, 1.05), 1.2).average_is_of_runs


def test_source_is_told() -> None:
    assert "Table I" in paper()["source"] and "not measured" in paper()["source"]
