"""tools/evaluate.py and tools/generate.py: errors end them with 2 before anything is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.evaluation.local_tasks import write_tasks
from tests.evaluation.worded_llama import save_worded_llama
from tests.ranks import Ranks
from tests.time_limits import seconds
from tools import evaluate, generate

BASE = ["--pretrained-checkpoint", "nowhere"]
TASKS = ["--tasks", "a", "--output", "x.json", *BASE]


@pytest.mark.parametrize(
    ("tool", "flags", "told"),
    [
        (evaluate, ["--output", "x.json"], ["--tasks"]),
        (
            evaluate,
            [*TASKS, "--tensor-model-parallel-sise", "2"],
            ["evaluate.py: error: ", "did you mean --tensor-model-parallel-size", "nowhere"],
        ),
        (generate, BASE, ["generate.py: error: give exactly one of --prompt TEXT and --prompt-file FILE."]),
        (generate, ["--prompt", "a", "--top-p", "2", *BASE], ["generate.py: error: --top-p is 2.0"]),
        (generate, ["--prompt", "a", *BASE], ["nowhere"]),
        (generate, ["--prompt", "a", "--load", "nowhere"], ["nowhere holds no checkpoint"]),
    ],
)
def test_what_is_wrong_is_told(capsys: pytest.CaptureFixture[str], tool, flags: list[str], told: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        tool.main(flags)
    err = capsys.readouterr().err
    assert [text for text in told if text not in err] == []


def test_an_unknown_task_ends_it_before_the_model_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a rank: it has joined the world by then, and ends without leaving it."""
    monkeypatch.setenv("TQDM_DISABLE", "1")
    base = save_worded_llama(tmp_path / "base")
    (base / "model.safetensors").unlink()
    tasks = write_tasks(tmp_path / "tasks", ["w1"], num_questions=2)
    where = ["--include-path", str(tasks), "--output", str(tmp_path / "out" / "x.json")]
    with Ranks(1, evaluate.main, ["--pretrained-checkpoint", str(base), "--tasks", "tiny_choice", *where]) as ranks:
        ranks.wait(seconds(300))
        assert ranks.exit_codes == [2]
        told = "evaluate.py: error: --tasks tiny_choice: no task has this name; did you mean tiny_choices?\n"
        assert ranks.output(0).endswith(told)
