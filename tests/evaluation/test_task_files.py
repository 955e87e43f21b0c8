"""Every place of a task's file at which the harness would evaluate, load or call what stands there."""

import json
import os
import re
import tomllib
from pathlib import Path
from typing import Any

import lm_eval
import pytest
from lm_eval import utils
from lm_eval.tasks import TaskManager

from megatron_peft.config import ConfigurationError
from megatron_peft.evaluation import harness_run
from megatron_peft.evaluation.harness_run import check_task_files, find_tasks
from megatron_peft.evaluation.task_names import harness_files, harness_folders, own_files, require_known_tasks
from tests.evaluation.local_tasks import TASKS, write_tasks

RUNS = "{{ cycler.__init__.__globals__.os.system('touch RAN') }}{{ question }}"
UNSAFE = "the template .* fails on an item with question, choices, label: access to attribute '__init__'"
CHOICES, ANSWERS, TEXTS = TASKS["tiny_choices"], TASKS["tiny_answers"], TASKS["tiny_texts"]
WRONG = tomllib.loads(Path(__file__).with_name("wrong_tasks.toml").read_text())
SOLVED = {"num_fewshot": 1, "fewshot_split": "test"}
HF_MODEL = {"pretrained": "evil", "trust_remote_code": True}
PROMPTS = "prompts:\n  evil: {doc_to_text: !!python/object/apply:os.system ['touch RAN'], doc_to_target: a}\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of tasks, which is the current one: RAN is written there by whatever runs."""
    monkeypatch.chdir(write_tasks(tmp_path / "tasks", ["a", "b"], num_questions=2))
    return tmp_path / "tasks"


def refusal(folder: Path, name: str = "mine", **settings: Any) -> str:
    with pytest.raises(ConfigurationError) as refused:
        find_tasks([name], [str(folder)], **settings)
    assert not (folder / "RAN").exists()
    return str(refused.value)


def write(folder: Path, task: dict[str, Any], name: str = "mine", functions: str = "") -> None:
    """A task on the data of the others. `functions` is YAML."""
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "questions.jsonl")}}}
    text = json.dumps({"task": name, **data, "test_split": "test", **task})
    (folder / f"{name}.yaml").write_text(text[:-1] + f"{functions and ', '}{functions}}}")


@pytest.mark.parametrize(
    "task",
    [
        *({**CHOICES, key: RUNS} for key in ("doc_to_text", "doc_to_target", "doc_to_choice")),
        *({**ANSWERS, key: RUNS} for key in ("doc_to_text", "doc_to_target", "description", "gen_prefix")),
        {**TEXTS, "doc_to_target": RUNS},
        *(
            {**ANSWERS, **SOLVED, "fewshot_config": {key: RUNS}}
            for key in ("doc_to_text", "doc_to_target", "gen_prefix")
        ),
        {**CHOICES, **SOLVED, "fewshot_config": {"doc_to_choice": RUNS}},
    ],
    ids=lambda task: f"{task['output_type']} {[key for key in task if task[key] == RUNS] or task['fewshot_config']}",
)
def test_no_template_runs_code(folder: Path, task: dict[str, Any]) -> None:
    write(folder, task)
    assert re.search(UNSAFE, refusal(folder))


def test_the_harness_renders_nowhere_else() -> None:
    assert utils.apply_template is harness_run._apply_template
    own = Path(lm_eval.__file__).parent
    files = [*own.glob("*.py"), *(own / "api").glob("*.py"), *(own / "prompts").glob("*.py")]
    users = {path.name for path in files if re.search(r"jinja2|\benv\.from_string", path.read_text())}
    assert users == {"utils.py"}


@pytest.mark.parametrize("place", ["task", "member", "included"])
@pytest.mark.parametrize("what", WRONG["refused"])
def test_what_would_run_code_is_refused_before_it_is_read_by_the_harness(folder: Path, what: str, place: str) -> None:
    written, told = WRONG["refused"][what]
    (folder / "evil").mkdir()
    (folder / "evil" / "evil.py").write_text("open('RAN', 'w')")
    os.mkfifo(folder / "pipe")
    task = f"{{task: mine, {written}}}"
    member = f"{{group: mine, task: [{{group: inner, task: [{task}]}}]}}"
    text = {"task": task, "member": member, "included": "{task: mine, include: base}"}[place]
    (folder / "mine.yaml").write_text(text)
    (folder / "base").write_text(task)
    with pytest.raises(ConfigurationError, match=re.escape(told)):
        check_task_files([str(folder)])


def test_code_beside_a_task_file_is_never_run(folder: Path) -> None:
    module = folder / "lm_eval" / "api" / "metrics.py"
    module.parent.mkdir(parents=True)
    module.write_text("open('RAN', 'w')\nmean = print")
    write(folder, ANSWERS, functions='"process_docs": !function lm_eval.api.metrics.mean')
    assert "refused: !function lm_eval.api.metrics.mean is not a function of" in refusal(folder)


QUESTION = {"question": "a", "choices": ["a", "b", "c", "d"], "label": 0}


@pytest.mark.parametrize(
    ("items", "told"),
    [
        ([{"query": "a", "answer": "b"}], "fails on an item with query, answer: 'question' is undefined"),
        (None, "mine cannot be loaded: "),
        ([QUESTION, {**QUESTION, "label": 7}], "label of item 1 is 7; choices are numbered from 0 to"),
        ([{**QUESTION, "label": 7}, QUESTION], "mine: the first item's label is not one of its choices"),
    ],
)
def test_data_that_does_not_fit_its_task_is_told(folder: Path, items: list[Any] | None, told: str) -> None:
    write(folder, CHOICES)
    (folder / "questions.jsonl").unlink()
    if items:
        (folder / "questions.jsonl").write_text("".join(json.dumps(one) + "\n" for one in items))
    assert told in refusal(folder)


def test_a_task_of_scored_items_only_shows_none_of_them(folder: Path) -> None:
    write(folder, CHOICES)
    assert "mine: --num-fewshot 1: it has only items that are scored" in refusal(folder, num_fewshot=1)
    find_tasks(["mine"], [str(folder)], num_fewshot=0)


def test_a_task_of_the_harness_with_functions_does_not_judge_other_data_unasked(folder: Path) -> None:
    own = Path(lm_eval.__file__).parent / "tasks" / "humaneval" / "humaneval.yaml"
    other = "dataset_path: json, dataset_kwargs: {data_files: evil.jsonl}"
    for text in (
        f"{{task: mine, include: {own}, {other}}}",
        f"{{group: mine, task: [{{task: humaneval, {other}}}]}}",
        f"{{group: mine, {other}, task: [humaneval]}}",
    ):
        (folder / "mine.yaml").write_text(text)
        with pytest.raises(
            ConfigurationError, match=r"mine.yaml is refused: .* builds on humaneval.yaml of the harness"
        ):
            check_task_files([str(folder)])
        check_task_files([str(folder)], may_run_code=True)
    for text in (f"{{task: mine, include: {own}}}", "{group: mine, task: [humaneval]}"):
        (folder / "mine.yaml").write_text(text)
        check_task_files([str(folder)])


@pytest.mark.parametrize("what", WRONG["mistakes"])
def test_a_mistake_is_told_before_the_model_is_loaded(folder: Path, what: str) -> None:
    settings, told = WRONG["mistakes"][what]
    write(folder, {**ANSWERS, **json.loads(settings)})
    assert told in refusal(folder)


def test_files_that_include_one_another_ten_times_over_are_read_once(folder: Path) -> None:
    (folder / "mine.yaml").write_text(json.dumps({"task": "mine", "include": ["mine.yaml"] * 10}))
    assert "cannot be loaded" in refusal(folder) or "no task has this name" in refusal(folder)


# Names of tasks: an unknown one is answered at once, a known one parses its own folders only.


def unknown(*names: str, folders: tuple[str, ...] = ()) -> str:
    with pytest.raises(ConfigurationError) as refused:
        require_known_tasks(names, folders)
    return str(refused.value)


def test_an_unknown_name_is_answered_with_the_nearest_ones():
    told = unknown("hellaswagg", "qqqqqqqq", "sst2", "mmlu")
    assert "--tasks hellaswagg: no task has this name; did you mean hellaswag or " in told
    assert "--tasks qqqqqqqq: no task has this name; give its folder with --include-path FOLDER" in told
    assert "sst2" not in told


@pytest.mark.parametrize(("name", "few"), [("sst2", 5), ("glue", 50), ("mmlu", 300), ("social_bias", 60)])
def test_a_task_a_group_and_a_tag_are_whole_without_the_other_thousands(name, few):
    known = TaskManager(include_path=list(harness_folders([name], [])), include_defaults=False)
    declared = harness_files()[name]
    assert {file.name for file in declared} <= set(known.all_tasks) and len(known.all_tasks) <= few
    index = known.task_index
    members = index[name].tags or set((index[name].cfg or {}).get("task") or ())
    assert {one for one in members if isinstance(one, str)} <= set(known.all_tasks)


@pytest.mark.slow
def test_the_names_are_those_that_the_harness_finds_in_all_of_its_files():
    index = TaskManager().task_index
    assert harness_files().keys() == index.keys()
    tags = {name: entry.tags for name, entry in index.items() if entry.kind.name == "TAG"}
    assert {name: {file.name for file in harness_files()[name]} for name in tags} == tags


def test_files_of_the_user_are_read_as_yaml_with_what_they_include(tmp_path: Path):
    (tmp_path / "common").write_text("tag: [mine, ours]\noutput_type: multiple_choice\n")
    (tmp_path / "a.yaml").write_text(json.dumps({"task": "a", "include": "common"}))
    (tmp_path / "group.yaml").write_text("group: both\ntask:\n  - a\n  - task: sst2\n    alias: films\n")
    (tmp_path / "nothing.yaml").write_text("- no task\n")
    found = own_files([str(tmp_path)])
    assert found.keys() == {"a", "mine", "ours", "both"}
    assert [file.name for file in found["ours"]] == ["a"] and found["both"][0].is_group
    require_known_tasks(["a", "mine", "both", "sst2"], [str(tmp_path)])
    (folder,) = harness_folders(["both"], [str(tmp_path)])  # for the member that the harness has
    assert folder.endswith("glue/sst2") and harness_folders(["a"], [str(tmp_path)]) == []
    assert "did you mean both" in unknown("bothh", folders=(str(tmp_path),))
    assert unknown("a", folders=("nowhere",)) == "--include-path nowhere: no such folder."
