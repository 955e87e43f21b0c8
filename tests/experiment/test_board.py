"""What the board shows of an experiment half done."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from rich.console import Console

from megatron_peft.experiment import process
from megatron_peft.experiment.board import Board, table
from megatron_peft.experiment.plan import Work
from megatron_peft.experiment.record import of_cell, write_record
from megatron_peft.experiment.runner import Runner
from tests.experiment.small_experiment import experiment


def half_done(folder: Path):
    """LoRA's grid (0.4 is best) and two of its seeds, one of them scored; of BOFT a failure."""
    _, groups = experiment(folder)
    lora, boft = groups
    for cell, loss in [(lora.tuning[0], 3.0), (lora.finals[1][0], 2.0), (lora.finals[1][1], 1.0)]:
        scores = {"accuracy": 40.0} if loss == 2.0 else {}
        write_record(folder, cell, of_cell(cell, "trained", validation_loss=loss, scores=scores))
    write_record(folder, boft.tuning[0], of_cell(boft.tuning[0], "failed"))
    return groups


def drawn(shown: Any) -> str:
    console = Console(file=io.StringIO(), width=150)
    console.print(shown)
    return console.file.getvalue()  # type: ignore[attr-defined]


def rows(text: str) -> dict[str, list[str]]:
    """Method -> the columns that follow its name."""
    lines = [[word.strip() for word in line.strip("│").split("│")] for line in text.splitlines() if "talk" in line]
    return {method: rest for _, _, method, *rest in lines}


def test_table_says_how_far_each_method_is(tmp_path: Path) -> None:
    found = rows(drawn(table(tmp_path, half_done(tmp_path))))
    assert found["lora"] == ["2/2", "lr=0.4", "2/3, 1 scored", "1.5", "accuracy 40"]
    assert found["boft"] == ["0/2 (1 failed)", "", "0/3, 0 scored", "", ""]


def test_events_are_lines_where_there_is_no_terminal(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=80)
    groups = half_done(tmp_path)
    with Board(tmp_path, groups, console) as board:
        board.report("trained [lora]")
        board.refresh(Runner(tmp_path, groups))
    assert console.file.getvalue() == "trained [lora]\n"  # type: ignore[attr-defined]


def test_terminal_shows_what_runs_and_is_drawn_once_a_second(tmp_path: Path) -> None:
    groups = half_done(tmp_path)
    cell = groups[1].tuning[1]
    metrics = process.checkpoints(tmp_path, cell) / "metrics.jsonl"
    metrics.parent.mkdir(parents=True)
    metrics.write_text('{"iteration": 7}\n')
    running = SimpleNamespace(seconds=12.0)
    runner = Runner(tmp_path, groups, running={cell.key: (Work("train", cell), running)})  # type: ignore[dict-item]
    console = Console(file=io.StringIO(), width=150, force_terminal=True)
    with Board(tmp_path, groups, console) as board:
        board.refresh(runner)
        assert f"train {cell.key}: iteration 7, 12 s" in console.file.getvalue()  # type: ignore[attr-defined]
        drawn_so_far = console.file.getvalue()  # type: ignore[attr-defined]
        running.seconds = 12.5
        board.refresh(runner)
        assert console.file.getvalue() == drawn_so_far  # type: ignore[attr-defined]
        running.seconds = 13.5
        board.refresh(runner)
        assert "iteration 7, 14 s" in console.file.getvalue()  # type: ignore[attr-defined]
