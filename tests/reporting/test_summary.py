from __future__ import annotations

from pathlib import Path

from megatron_peft.experiment.record import cell_file
from megatron_peft.reporting import summary
from megatron_peft.reporting.results import read_results
from megatron_peft.reporting.table1 import rows
from tests.reporting.small_results import LOSSES, results


def test_unfinished_experiment_says_so(tmp_path: Path) -> None:
    found = results(tmp_path)
    assert summary.state(found) == "9 of 9 final runs are there (seeds 1, 2, 3)."
    cell_file(tmp_path, found.all[0].group.finals[1][2]).unlink()
    found = read_results(tmp_path)
    assert summary.state(found).startswith("**Not finished:** 8 of 9")
    assert summary.verdicts(rows(found, "hybrid"))[0].startswith("tiny, talk, validation loss: so far, lora-ga has the")


def test_budget_is_told_with_flags_and_tries(tmp_path: Path) -> None:
    (told,) = summary.budgets(results(tmp_path))
    assert "2 tuning runs a method with seed 1, chosen by validation loss alone; 3 runs" in told
    assert "`--train-iters 2 --train-data-path train.jsonl --valid-data-path valid.jsonl`" in told


def test_hybrid_that_does_not_win_is_told(tmp_path: Path) -> None:
    found = results(tmp_path)
    loss, accuracy = summary.verdicts(rows(found, "hybrid"))
    assert loss == (
        "tiny, talk, validation loss: lora-ga has the best mean of 3 methods, 1.530. "
        "The Hybrid (hybrid, 1.630) does not win: lora-ga is ahead of it."
    )
    assert "accuracy: lora-ga has the best mean of 3 methods, 84.70" in accuracy


def test_hybrid_that_wins_is_told(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(LOSSES, "hybrid", 1.0)
    assert summary.verdicts(rows(results(tmp_path), "hybrid"))[0].endswith("1.030. That is the Hybrid.")


def test_tuning_shows_every_point_and_the_choice(tmp_path: Path) -> None:
    table = summary.tuning(results(tmp_path))
    assert [row[3:] for row in table.rows[:2]] == [
        ("lr=0.1", "1", "3.020", ""),
        ("lr=0.4", "1", "2.020", "yes"),
    ]


def test_versions_are_those_of_the_runs(tmp_path: Path) -> None:
    assert summary.versions(results(tmp_path)) == "Versions: python 3.11."
