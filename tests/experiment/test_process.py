"""Command lines of a cell's processes, and what is left of their words; kills are in test_runner.py."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_peft.experiment import process
from megatron_peft.experiment.cells import Cell
from megatron_peft.experiment.spec import Score

CELL = Cell("tiny", "talk", "lora", {"lr": "0.1"}, 1, ("--lr", "0.1"))
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


def leave_checkpoint(folder: Path) -> str:
    saved = process.checkpoints(folder, CELL)
    saved.mkdir(parents=True)
    (saved / process.TRACKER).write_text("5")
    return str(saved)


def test_a_stopped_cell_goes_on(tmp_path: Path) -> None:
    assert "--load" not in process.training_command(tmp_path, CELL, ["train.py"])
    saved = leave_checkpoint(tmp_path)
    expected = [sys.executable, "train.py", "--lr", "0.1", "--save", saved, "--load", saved]
    assert process.training_command(tmp_path, CELL, ["train.py"]) == expected


def test_a_stopped_cell_whose_checkpoints_have_no_optimizer_begins_again(tmp_path: Path) -> None:
    leave_checkpoint(tmp_path)
    assert "--load" not in process.training_command(tmp_path, replace(CELL, flags=("--no-save-optim",)), ["train.py"])


def test_score_gets_the_cells_places_and_flags(tmp_path: Path) -> None:
    score = Score(("python", "score.py", "--out={output}", "{checkpoints}", "{flags}", "{flags}x"), {})
    places = f"--out={process.score_file(tmp_path, CELL)}", str(process.checkpoints(tmp_path, CELL))
    expected = [sys.executable, "score.py", *places, "--lr", "0.1", "{flags}x"]
    assert process.score_command(tmp_path, CELL, score) == expected


@pytest.mark.parametrize(
    ("processes", "environment", "expected"),
    [
        (1, {"SLURM_JOB_NUM_NODES": "2"}, [sys.executable]),
        (3, {}, [*TORCHRUN, "--standalone", "--nproc-per-node", "3"]),
        (3, {"SLURM_JOB_NUM_NODES": "1"}, [*TORCHRUN, "--standalone", "--nproc-per-node", "3"]),
    ],
)
def test_launcher_of_one_machine(processes: int, environment: dict[str, str], expected: list[str]) -> None:
    assert process.launcher(processes, environment) == expected


def test_launcher_of_an_allocation_shares_the_processes_out_and_picks_the_jobs_port() -> None:
    allocation = {"SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "10007", "MASTER_ADDR": "n1"}
    command = process.launcher(16, allocation)
    assert command[0] == "srun" and command[command.index("--nproc-per-node") + 1] == "8"
    assert command[command.index("--rdzv-endpoint") + 1] == "n1:20007"


def test_last_words_are_those_of_the_last_command(tmp_path: Path) -> None:
    for words in ("first", "second"):
        running = process.start(["echo", words], tmp_path / "runs" / "log.txt")
        assert running.process.wait() == 0
    assert running.last_words() == "second"
    silent = process.start(["true"], tmp_path / "runs" / "log.txt")
    silent.process.wait()
    assert silent.last_words() == "it said nothing"


def test_lambdas_are_none_where_a_run_wrote_none(tmp_path: Path) -> None:
    assert process.lambdas(tmp_path, CELL) == {}
    path = Path(leave_checkpoint(tmp_path), process.LAMBDA_FILE)
    path.write_text('{"iteration": 1, "lambda": {"fc1": 0.5}}\n')
    assert process.lambdas(tmp_path, CELL)["by_layer"] == {"fc1": [0.5]}
