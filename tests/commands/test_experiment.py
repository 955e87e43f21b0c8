"""megatron-peft experiment: exit codes, and what is said on the terminal."""

from pathlib import Path
from typing import Any

import pytest

from megatron_peft.commands import experiment
from megatron_peft.experiment import runner
from tests.experiment.small_experiment import FAKE_TRAINING, content, write


def call(folder: Path, *extra: str, **changes: Any) -> int:
    return experiment.main([str(write(folder, content(**changes))), "--output", str(folder / "out"), *extra])


@pytest.fixture
def fake_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner.process, "PROGRAM", FAKE_TRAINING)


@pytest.mark.parametrize(("rate", "code"), [(0.4, 0), (9, 1)])
def test_exit_code_says_whether_every_cell_was_trained(fake_training, tmp_path, capsys, rate, code):
    assert call(tmp_path, "--jobs", "2", methods={"lora": {"grid": {"lr": [rate]}}}) == code
    assert (f"trained tiny,talk,lora,lr={rate},seed=3 in" in capsys.readouterr().out) == (code == 0)


def test_list_runs_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(tmp_path, "--list") == 0
    assert "0/2" in capsys.readouterr().out and not (tmp_path / "out").exists()


def test_group_runs_its_cells_alone(fake_training: None, tmp_path: Path) -> None:
    assert call(tmp_path, "--group", "tiny,talk,boft") == 0
    assert {path.name.split(",")[2] for path in (tmp_path / "out" / "cells").iterdir()} == {"boft"}


@pytest.mark.parametrize(
    ("extra", "changes", "told"),
    [
        (["--group", "tiny,talk"], {}, "--group tiny,talk: there are tiny,talk,lora; tiny,talk,boft"),
        ([], {"seeds": [1, 1]}, "experiment: error: "),
        ([], {"methods": {"lorra": {}}}, "lorra"),
        (["--emit-slurm", "."], {}, "cannot be written (Is a directory)"),
    ],
)
def test_what_is_wrong_exits_with_2_before_anything_is_written(tmp_path, capsys, extra, changes, told):
    assert call(tmp_path, *extra, **changes) == 2
    assert told in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_slurm_script_is_written_in_a_folder_of_its_own_and_nothing_runs(tmp_path: Path) -> None:
    script = tmp_path / "new" / "submit.sh"
    assert call(tmp_path, "--emit-slurm", str(script)) == 0
    assert script.read_text().startswith("#!") and "--array=0-1" in script.read_text()
    assert not (tmp_path / "out").exists()
