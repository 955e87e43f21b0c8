"""tools/evaluate.py as a command: help, and errors that end it with 2."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.evaluation.local_tasks import write_tasks
from tests.evaluation.worded_llama import save_worded_llama

ROOT = Path(__file__).parents[2]


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "tools/evaluate.py", *arguments], cwd=ROOT, capture_output=True, text=True)


def test_help_comes_without_torch() -> None:
    program = (
        "import sys, tools.evaluate as e\ntry: e.main(['--help'])\nexcept SystemExit: print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert "--num-fewshot N" in done.stdout and done.stdout.strip().endswith("False"), done.stderr


def test_tasks_are_needed(capsys: pytest.CaptureFixture[str]) -> None:
    from tools import evaluate

    with pytest.raises(SystemExit, match="2"):
        evaluate.main(["--output", "x.json"])
    assert "--tasks" in capsys.readouterr().err


def test_flags_of_neither_program_are_answered_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    from tools import evaluate

    flags = ["--tasks", "a", "--output", "x.json", "--pretrained-checkpoint", "nowhere"]
    with pytest.raises(SystemExit, match="2"):
        evaluate.main([*flags, "--tensor-model-parallel-sise", "2"])
    told = capsys.readouterr().err
    assert told.startswith("evaluate.py: error: ") and "did you mean --tensor-model-parallel-size" in told
    assert "nowhere" in told


def test_an_unknown_task_ends_it_before_the_model_is_loaded(tmp_path: Path) -> None:
    base = save_worded_llama(tmp_path / "base")
    (base / "model.safetensors").unlink()
    tasks = write_tasks(tmp_path / "tasks", ["w1"], num_questions=2)
    where = ["--include-path", str(tasks), "--output", str(tmp_path / "out" / "x.json")]
    done = _run("--pretrained-checkpoint", str(base), "--tasks", "tiny_choice", *where)
    assert done.returncode == 2
    assert done.stderr.endswith(
        "evaluate.py: error: --tasks tiny_choice: no task has this name; did you mean tiny_choices?\n"
    )
