"""What is wrong with a tool's flags or files is told on stderr with exit code 2, and nothing is written."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from tests.evaluation.local_tasks import write_tasks
from tests.evaluation.worded_llama import save_worded_llama
from tests.ranks import Ranks
from tests.time_limits import seconds
from tools import bench, convert, evaluate, generate, prepare_data, report

SAMPLES = Path(__file__).parents[2] / "examples" / "data"
BASE = "--pretrained-checkpoint nowhere"
OUT = "--input nowhere --output out"


@pytest.mark.parametrize(
    ("tool", "line", "told"),
    [
        (bench, "c", "no benchmark is called c: there are "),
        (convert, f"hf-to-megatron {OUT}", "^error: .*nowhere is not a folder"),
        (convert, f"megatron-to-hf {OUT}", "^error: --input nowhere holds no Megatron checkpoint"),
        (convert, "megatron-to-hf --input . --output out --max-shard-size 2apples", "^error: .*is no size"),
        (convert, f"merge {OUT}", "^error: .*nowhere"),
        (convert, f"merge {OUT} --num-tokens 3", "--num-tokens"),
        (convert, f"export-adapter {OUT}", "^error: .*nowhere"),
        (convert, f"import-adapter {OUT} {BASE}", "^error: .*nowhere"),
        (convert, "verify --input nowhere --reference nowhere", "^error: .*nowhere is not a folder"),
        (evaluate, "--output x.json", "--tasks"),
        (
            evaluate,
            f"--tasks a --output x.json {BASE} --tensor-model-parallel-sise 2",
            "(?s)evaluate.py: error: .*did you mean --tensor-model-parallel-size.*nowhere",
        ),
        (generate, BASE, "generate.py: error: give exactly one of --prompt TEXT and --prompt-file FILE."),
        (generate, f"--prompt a --top-p 2 {BASE}", "generate.py: error: --top-p is 2.0"),
        (generate, f"--prompt a {BASE}", "nowhere"),
        (generate, "--prompt a --load nowhere", "nowhere holds no checkpoint"),
        (prepare_data, "gsm8k --input . --output out", "^error: --input"),
        (prepare_data, f"gsm8k --input {SAMPLES}/gsm8k --output out --test-percent 5", "test items of their own"),
        (report, ".", "^report: error: "),
    ],
)
def test_it_is_told_and_nothing_is_written(tmp_path, monkeypatch, capsys, tool, line, told):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        sys.exit(tool.main(line.split()))
    out, err = capsys.readouterr()
    assert re.search(told, err) and out == ""
    assert list(tmp_path.iterdir()) == []


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
