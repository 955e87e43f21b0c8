"""What is written into a benchmark's folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_peft.config_error import ConfigurationError
from megatron_peft.data.preparation.document import Document, normalised
from megatron_peft.data.preparation.prepare import Benchmark, Prepared, Tests, prepare
from megatron_peft.data.preparation.split import HashSplit
from megatron_peft.data.preparation.template import TaskTemplate

TEMPLATE = TaskTemplate("gsm8k_8shot")
PLAIN = TaskTemplate("glue_sst2")


def items(texts: list[str], name: str = "train") -> list[Document]:
    return [Document({"sentence": t, "label": 1}, (t,), f"{name}, line {n}") for n, t in enumerate(texts, 1)]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def run(folder: Path, train: list[str], test: list[str], **settings: Any) -> Prepared:
    tests = Tests((PLAIN,), items(test, "test"))
    split = HashSplit(settings.pop("valid_percent", 20), settings.pop("test_percent", 0))
    return prepare(Benchmark(PLAIN, items(train), [tests]), folder, split, **settings)


def test_training_files_and_task_are_written(tmp_path: Path) -> None:
    done = run(tmp_path / "out", [f"sentence {n}" for n in range(50)], ["good", "fine"])
    assert {path.name for path in done.folder.iterdir()} == {
        "train.jsonl",
        "valid.jsonl",
        "fewshot.jsonl",
        "test.jsonl",
        "glue_sst2.yaml",
    }
    assert len(lines(done.folder / "train.jsonl")) + len(lines(done.folder / "valid.jsonl")) == 50
    record = lines(done.folder / "train.jsonl")[0]
    assert set(record) == {"prompt", "completion"} and record["completion"] == " positive"
    assert lines(done.folder / "test.jsonl")[0] == {"sentence": "good", "label": 1}
    assert str(tmp_path / "out" / "test.jsonl") in (done.folder / "glue_sst2.yaml").read_text()


def test_test_items_are_left_out_and_counted(tmp_path: Path) -> None:
    train = [f"sentence {n}" for n in range(50)] + ["A TEST, item!"]
    done = run(tmp_path / "out", train, ["a test item"])
    assert done.counts["removed"] == 1
    assert done.example == "train, line 51 is the test item of test, line 1"
    assert "TEST" not in (done.folder / "train.jsonl").read_text() + (done.folder / "valid.jsonl").read_text()


def test_test_items_are_an_error_on_request(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="train, line 51 is the test item of test, line 1.*--overlap remove"):
        run(tmp_path / "out", [f"sentence {n}" for n in range(50)] + ["a test item"], ["A test item."], overlap="error")
    assert list(tmp_path.iterdir()) == [], "nothing is left of a preparation that failed"


TEXTS = st.lists(st.text("ab .A", min_size=1, max_size=6), max_size=30)


@settings(max_examples=30)
@given(train=TEXTS, test=st.lists(st.text("ab .A", min_size=1, max_size=6), min_size=1, max_size=10))
def test_no_test_item_is_ever_trained_on(
    train: list[str], test: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    train = [*train, *(f"filler {n}" for n in range(40))]
    done = run(tmp_path_factory.mktemp("x") / "out", train, test, valid_percent=30)
    trained = lines(done.folder / "train.jsonl") + lines(done.folder / "valid.jsonl")
    texts = {normalised(record["prompt"].partition("\nQuestion")[0]) for record in trained} - {""}
    assert not texts & {normalised(text) for text in test}
    assert len(trained) + done.counts["removed"] == len(train)


def test_without_test_items_the_split_makes_them(tmp_path: Path) -> None:
    done = run(tmp_path / "out", [f"sentence {n}" for n in range(200)], [], test_percent=20)
    counts = [len(lines(done.folder / f"{part}.jsonl")) for part in ("train", "valid", "test")]
    assert sum(counts) == 200 and min(counts) > 10


def test_no_test_items_at_all_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigurationError, match="no item for glue_sst2: give a file of test items, or a --test-percent"
    ):
        run(tmp_path / "out", [f"sentence {n}" for n in range(50)], [])
    assert list(tmp_path.iterdir()) == []


def test_solved_examples_come_from_training_items(tmp_path: Path) -> None:
    problems = [Document({"question": f"q{n}", "answer": "#### 1"}, (f"q{n}",), f"line {n}") for n in range(200)]
    tests = Tests((TEMPLATE,), problems[:2])
    done = prepare(Benchmark(TEMPLATE, problems, [tests]), tmp_path / "out", HashSplit(50))
    shown = [record["question"] for record in lines(done.folder / "fewshot.jsonl")]
    trained = [record["prompt"] for record in lines(done.folder / "train.jsonl")]
    assert len(shown) == 64 < len(trained), "the first ones, for the task's 8 and for --num-fewshot"
    assert [f"Question: {question}\nAnswer:" for question in shown] == trained[:64]


def test_too_few_solved_examples_are_an_error(tmp_path: Path) -> None:
    problems = [Document({"question": f"q{n}", "answer": "#### 1"}, (f"q{n}",), f"line {n}") for n in range(9)]
    benchmark = Benchmark(TEMPLATE, problems[:7], [Tests((TEMPLATE,), problems[7:])])
    with pytest.raises(ConfigurationError, match="8 solved items are shown before each question, and there are 7"):
        prepare(benchmark, tmp_path / "out", HashSplit(0))


def test_empty_part_is_an_error_with_the_numbers(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigurationError, match="train.jsonl and valid.jsonl would be empty: 0 items to train on, and 1 left out"
    ):
        run(tmp_path / "out", ["good"], ["good"])


def test_existing_folder_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(ConfigurationError, match="exists already"):
        run(tmp_path / "out", ["a"], ["b"])


def test_unknown_treatment_of_overlap_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="--overlap is keep; it is remove or error"):
        run(tmp_path / "out", ["a"], ["b"], overlap="keep")
