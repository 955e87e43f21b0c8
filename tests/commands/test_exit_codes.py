"""Exit codes of tools: what is wrong with flags or files is told on stderr with 2, and nothing is written."""

import json
import re
import sys
from pathlib import Path

import pytest

from megatron_peft import benchmarks
from megatron_peft.benchmarks import measure
from megatron_peft.benchmarks.measure import Figure
from megatron_peft.commands import bench, convert, demo, evaluate, generate, prepare, report
from tests.evaluation.local_tasks import write_tasks
from tests.evaluation.worded_llama import save_worded_llama
from tests.experiment.small_results import write_cells
from tests.ranks import Ranks
from tests.time_limits import seconds

SAMPLES = Path(__file__).parents[2] / "examples" / "data"
BASE = "--pretrained-checkpoint nowhere"
OUT = "--input nowhere --output out"


@pytest.mark.parametrize(
    ("tool", "line", "told"),
    [
        (bench, "c", "no benchmark is called c: there are "),
        (convert, f"hf-to-megatron {OUT}", ": error: .*nowhere is not a folder"),
        (convert, f"megatron-to-hf {OUT}", ": error: --input nowhere holds no Megatron checkpoint"),
        (convert, "megatron-to-hf --input . --output out --max-shard-size 2apples", ": error: .*is not a size"),
        (convert, f"merge {OUT}", ": error: .*nowhere"),
        (convert, f"merge {OUT} --num-tokens 3", "--num-tokens"),
        (convert, f"export-adapter {OUT}", ": error: .*nowhere"),
        (convert, f"export-adapter {OUT} --as-lora", ": error: .*nowhere"),
        (convert, f"export-adapter {OUT} --max-rank 8", ": error: --max-rank: give --as-lora too, or leave it out"),
        (convert, f"import-adapter {OUT} {BASE}", ": error: .*nowhere"),
        (convert, "verify --input nowhere --reference nowhere", ": error: .*nowhere is not a folder"),
        (evaluate, "--output x.json", "--tasks"),
        (
            evaluate,
            f"--tasks arc_easy --output x.json {BASE} --tensor-model-parallel-sise 2",
            "(?s)megatron-peft evaluate: error: .*did you mean --tensor-model-parallel-size(?!.*nowhere)",
        ),
        (generate, BASE, "megatron-peft generate: error: give exactly one of --prompt TEXT and --prompt-file FILE."),
        (generate, "--nope", "^megatron-peft generate: error: --nope is not a known flag"),
        (generate, f"--prompt a --top-p 2 {BASE}", "megatron-peft generate: error: --top-p is 2.0"),
        (generate, f"--prompt a {BASE}", "nowhere"),
        (
            generate,
            f"{BASE} --prompt a b",
            "error: --prompt takes one value, but a b follow it: put a text with spaces",
        ),
        (generate, "--prompt a", "megatron-peft generate: error: no base model: --pretrained-checkpoint"),
        (
            evaluate,
            "--tasks arc_easy --output x.json",
            "megatron-peft evaluate: error: no base model: --pretrained-checkpoint",
        ),
        (demo, "--nope --output out", "^megatron-peft demo: error: --nope is not a known flag"),
        (generate, "--prompt a --load nowhere", "nowhere holds no checkpoint"),
        (prepare, "gsm8k --input . --output out", ": error: --input"),
        (prepare, f"gsm8k --input {SAMPLES}/gsm8k --output out --test-percent 5", "for data without a test split"),
        (report, ".", r"^megatron-peft report: error: \. holds neither a run \(metrics.jsonl, checkpoints\) nor "),
        (report, "nowhere", "^megatron-peft report: error: there is no folder nowhere"),
    ],
)
def test_what_is_wrong_is_told_and_nothing_is_written(tmp_path, monkeypatch, capsys, tool, line, told):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        sys.exit(tool.main(line.split()))
    out, err = capsys.readouterr()
    assert re.search(told, err) and out == ""
    assert list(tmp_path.iterdir()) == []


def end_of_evaluate(words: list[str]) -> None:
    sys.exit(evaluate.main(words))


def test_an_unknown_task_ends_it_before_the_model_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a rank: it has joined the world by then, and ends without leaving it."""
    monkeypatch.setenv("TQDM_DISABLE", "1")
    base = save_worded_llama(tmp_path / "base")
    (base / "model.safetensors").unlink()
    tasks = write_tasks(tmp_path / "tasks", ["w1"], num_questions=2)
    where = ["--include-path", str(tasks), "--output", str(tmp_path / "out" / "x.json")]
    with Ranks(1, end_of_evaluate, ["--pretrained-checkpoint", str(base), "--tasks", "tiny_choice", *where]) as ranks:
        ranks.wait(seconds(300))
        assert ranks.exit_codes == [2]
        told = "megatron-peft evaluate: error: --tasks tiny_choice: no task has this name; did you mean tiny_choices"
        assert told in ranks.output(0)


ROWS = (("a", 1), ("b", 3))


@pytest.mark.parametrize(("names", "code", "files"), [(["a"], 0, {"a.json"}), ([], 1, {"a.json", "b.json"})])
def test_exit_code_says_whether_all_was_reached(tmp_path, monkeypatch, names, code, files):
    monkeypatch.setattr(measure, "measured", lambda setting: [Figure("x", setting.rows, 2.0)], raising=False)
    named = {name: benchmarks.Benchmark(name, "measure:measured", setting={"rows": rows}) for name, rows in ROWS}
    monkeypatch.setattr(benchmarks, "BENCHMARKS", named)
    assert bench.main([*names, "--output", str(tmp_path)]) == code
    assert {path.name for path in tmp_path.iterdir()} == files
    assert json.loads((tmp_path / "a.json").read_text())[0]["reached"] is True


def test_report_elsewhere_takes_the_cells_along(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("megatron_peft.experiment.plots.svg", lambda figure: "<svg/>")  # takes seconds
    monkeypatch.setattr("megatron_peft.experiment.plots.save", lambda *_: None)
    write_cells(tmp_path)
    assert report.main([str(tmp_path), "--output", str(tmp_path / "there")]) == 0
    assert str(tmp_path / "there" / "report.html") in capsys.readouterr().out
    first = (tmp_path / "there" / "report.md").read_text()
    assert report.main([str(tmp_path / "there")]) == 0
    assert (tmp_path / "there" / "report.md").read_text() == first


def test_unknown_method_exits_with_2_and_writes_nothing(tmp_path, capsys):
    write_cells(tmp_path)
    assert report.main([str(tmp_path), "--against", "lorra", "--output", str(tmp_path / "there")]) == 2
    assert "--against lorra" in capsys.readouterr().err and not (tmp_path / "there").exists()
