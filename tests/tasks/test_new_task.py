"""A task with training data costs one file: the one that docs/benchmark-tasks.md shows."""

import json
import re
import shutil
from pathlib import Path

import pytest

from megatron_peft.commands.prepare import main
from megatron_peft.config import ConfigurationError
from megatron_peft.evaluation.harness_run import find_tasks
from megatron_peft.tasks import readers
from megatron_peft.tasks.readers import read_task_file, shipped
from megatron_peft.tasks.prepare import TASKS, TaskTemplate

PAGE = Path(__file__).parents[2] / "docs" / "benchmark-tasks.md"
(SOURCE,) = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), re.DOTALL)
NAME = re.findall(r"Save this as `(\w+)\.yaml`", PAGE.read_text())[0]
QUESTIONS = [{"passage": f"It is {n}.", "question": f"is {n} even", "answer": n % 2 == 0} for n in range(40)]


def save_questions(folder: Path) -> Path:
    folder.mkdir()
    for name, questions in (("train", QUESTIONS[:34]), ("dev", QUESTIONS[32:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    return folder


def prepare(tmp_path: Path, command: str) -> Path:
    data, out = save_questions(tmp_path / "boolq"), tmp_path / "out"
    assert main([command, "--input", str(data), "--output", str(out), "--valid-percent", "25"]) == 0
    return out


def test_its_items_are_trained_on_and_scored(tmp_path: Path) -> None:
    (tmp_path / f"{NAME}.yaml").write_text(SOURCE)
    out = prepare(tmp_path, str(tmp_path / f"{NAME}.yaml"))
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
        assert (prepare(tmp_path, NAME) / f"{NAME}.yaml").exists()
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
    assert main([str(file), "--input", str(data), "--output", str(tmp_path / "out"), "--valid-percent", "25"]) == 2
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
