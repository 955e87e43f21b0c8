"""Exit codes and printed lines of commands; what is wrong with flags or files ends with 2, and nothing is written."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_peft import benchmarks
from megatron_peft.benchmarks import measure
from megatron_peft.benchmarks.measure import Figure
from megatron_peft.cli.launch import LOADING
from megatron_peft.commands import bench, convert, data, demo, evaluate, experiment, generate, report
from megatron_peft.conversion import verify
from megatron_peft.experiment import runner
from tests.conversion.megatron_folders import equal, save_random, tensors_of
from tests.evaluation.local_tasks import write_tasks
from tests.evaluation.worded_llama import save_worded_llama
from tests.experiment.small_experiment import FAKE_TRAINING, content, write
from tests.experiment.small_results import write_cells
from tests.ranks import Ranks
from tests.time_limits import seconds

SAMPLES = Path(__file__).parents[2] / "examples" / "data"
BASE = "--pretrained-checkpoint nowhere"
OUT = "--input nowhere --output out"


GENERATE, EVALUATE = "megatron-peft generate: error: ", "megatron-peft evaluate: error: "
UNKNOWN = "is not a known flag"
TASK = "--tasks arc_easy --output x.json"
WRONG = [
    (bench.main, "c", "no benchmark is called c: there are "),
    (convert.main, f"hf-to-megatron {OUT}", ": error: .*nowhere is not a folder"),
    (convert.main, f"megatron-to-hf {OUT}", ": error: --input nowhere holds no Megatron checkpoint"),
    (convert.main, "megatron-to-hf --input . --output out --max-shard-size 2apples", ": error: .*is not a size"),
    (convert.main, f"merge {OUT}", ": error: .*nowhere"),
    (convert.main, f"merge {OUT} --max-rank 3", "--max-rank"),
    (convert.main, f"export-adapter {OUT}", ": error: .*nowhere"),
    (convert.main, f"export-adapter {OUT} --as-lora", ": error: .*nowhere"),
    (convert.main, f"export-adapter {OUT} --max-rank 8", ": error: --max-rank: give --as-lora too, or leave it out"),
    (convert.main, f"import-adapter {OUT} {BASE}", ": error: .*nowhere"),
    (convert.main, "verify --input nowhere --reference nowhere", ": error: .*nowhere is not a folder"),
    (evaluate.main, "--output x.json", "--tasks"),
    (
        evaluate.main,
        f"{TASK} {BASE} --tensor-model-parallel-sise 2",
        f"(?s){EVALUATE}.*did you mean --tensor-model-parallel-size(?!.*nowhere)",
    ),
    (generate.main, BASE, f"{GENERATE}give exactly one of --prompt TEXT and --prompt-file FILE."),
    (generate.main, "--nope", f"^{GENERATE}--nope {UNKNOWN}"),
    (generate.main, f"--prompt a --top-p 2 {BASE}", f"{GENERATE}--top-p is 2.0"),
    (generate.main, f"--prompt a {BASE}", "nowhere"),
    (generate.main, f"{BASE} --prompt a b", "--prompt takes one value, but a b follow it: put a text with spaces"),
    (generate.main, "--prompt a", f"{GENERATE}no base model: --pretrained-checkpoint"),
    (evaluate.main, TASK, f"{EVALUATE}no base model: --pretrained-checkpoint"),
    (demo.main, "--nope --output out", f"^megatron-peft demo: error: --nope {UNKNOWN}"),
    (generate.main, "--prompt a --load nowhere", "nowhere holds no checkpoint"),
    (data.prepare_data, "gsm8k --input . --output out", ": error: --input"),
    (data.prepare_data, f"gsm8k --input {SAMPLES}/gsm8k --output out --test-percent 5", "data without a test split"),
    (report.main, ".", r"^megatron-peft report: error: \. holds neither a run \(metrics.jsonl, checkpoints\) nor "),
    (report.main, "nowhere", "^megatron-peft report: error: there is no folder nowhere"),
]


@pytest.mark.parametrize(("main", "line", "told"), WRONG)
def test_what_is_wrong_is_told_and_nothing_is_written(tmp_path, monkeypatch, capsys, main, line, told):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        sys.exit(main(line.split()))
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


def test_convert_there_and_back(tmp_path, capsys):
    original = save_random(tmp_path / "hf")
    megatron, back = tmp_path / "megatron", tmp_path / "back"
    there = f"hf-to-megatron --input {original} --output {megatron} --make-vocab-size-divisible-by 64"
    assert convert.main(there.split()) == 0
    assert convert.main(f"megatron-to-hf --input {megatron} --output {back} --max-shard-size 2KB".split()) == 0
    assert equal(tensors_of(back), tensors_of(original))
    assert (back / "model.safetensors.index.json").is_file()
    assert tuple(capsys.readouterr()) == (f"wrote {megatron}\nwrote {back}\n", 2 * LOADING)


def test_verify_says_how_far_apart(monkeypatch, capsys):
    found = verify.LogitComparison(verify.Difference(0.5, 100.0), [verify.Difference(0.25, 10.0)], 3, 4)
    monkeypatch.setattr(verify, "verify", lambda *_, **__: found)
    flags = ["verify", "--input", "a", "--output", "b", "--per-layer"]
    assert convert.main(flags) == 1
    assert capsys.readouterr().out == (
        "layer   0: largest difference 0.25, relative 0.025\n"
        "logits: largest difference 0.5, relative 0.005 (above --tolerance 0.0001); largest logit 100; "
        "same best token at 3 of 4 positions\n"
    )
    assert convert.main([*flags, "--tolerance", "0.01"]) == 0


def call(folder: Path, *extra: str, **changes: Any) -> int:
    """`megatron-peft experiment` with a training that is not real."""
    return experiment.main([str(write(folder, content(**changes))), "--output", str(folder / "out"), *extra])


@pytest.fixture
def fake_training(monkeypatch):
    monkeypatch.setattr(runner.process, "PROGRAM", FAKE_TRAINING)


@pytest.mark.parametrize(("rate", "code"), [(0.4, 0), (9, 1)])
def test_exit_code_says_whether_every_cell_was_trained(fake_training, tmp_path, capsys, rate, code):
    assert call(tmp_path, "--jobs", "2", methods={"lora": {"grid": {"lr": [rate]}}}) == code
    assert (f"trained tiny,talk,lora,lr={rate},seed=3 in" in capsys.readouterr().out) == (code == 0)


def test_group_runs_its_cells_alone(fake_training, tmp_path):
    assert call(tmp_path, "--group", "tiny,talk,boft") == 0
    assert {path.name.split(",")[2] for path in (tmp_path / "out" / "cells").iterdir()} == {"boft"}


def test_list_runs_nothing(tmp_path, capsys):
    assert call(tmp_path, "--list") == 0
    assert "0/2" in capsys.readouterr().out and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("extra", "changes", "told"),
    [
        (["--group", "tiny,talk"], {}, "--group tiny,talk: there are tiny,talk,lora; tiny,talk,boft"),
        ([], {"seeds": [1, 1]}, "experiment: error: "),
        ([], {"methods": {"lorra": {}}}, "lorra"),
        (["--emit-slurm", "."], {}, "cannot be written (Is a directory)"),
    ],
)
def test_a_wrong_experiment_is_told_before_anything_is_written(tmp_path, capsys, extra, changes, told):
    assert call(tmp_path, *extra, **changes) == 2
    assert told in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_slurm_script_is_written_in_a_folder_of_its_own_and_nothing_runs(tmp_path):
    script = tmp_path / "new" / "submit.sh"
    assert call(tmp_path, "--emit-slurm", str(script), "--jobs", "2", "--keep-checkpoints") == 0
    assert '--group "$group" --jobs 2 --keep-checkpoints\n' in script.read_text()
    assert script.read_text().startswith("#!") and "--array=0-1" in script.read_text()
    assert not (tmp_path / "out").exists()
