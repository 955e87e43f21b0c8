"""Names of tasks, known from the first words of files: an unknown one is answered at once, a known one parses its own
folders only."""

import json
from pathlib import Path

import pytest
from lm_eval.tasks import TaskManager

from megatron_peft.config import ConfigurationError
from megatron_peft.evaluation.task_names import harness_files, harness_folders, own_files, require_known_tasks


def refusal(*names: str, folders: tuple[str, ...] = ()) -> str:
    with pytest.raises(ConfigurationError) as refused:
        require_known_tasks(names, folders)
    return str(refused.value)


def test_an_unknown_name_is_answered_with_the_nearest_ones():
    assert "--tasks hellaswagg: no task has this name; did you mean hellaswag, " in refusal("hellaswagg")
    assert "--tasks qqqqqqqq: no task has this name; give the folder" in refusal("qqqqqqqq", "sst2", "mmlu")
    both = refusal("hellaswagg", "qqqqqqqq")
    assert "hellaswagg" in both and "qqqqqqqq" in both


def test_a_task_that_is_to_be_prepared_is_told():
    assert refusal("glue_paper").startswith("--tasks glue_paper: megatron-peft data prepare writes this task: ")
    assert "did you mean glue_paper (of megatron-peft data prepare), " in refusal("glue_papr")


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
    found = {file.name: file for file in own_files([str(tmp_path)])}
    assert found.keys() == {"a", "both"} and found["a"].tags == ("mine", "ours") and found["both"].is_group
    require_known_tasks(["a", "mine", "both", "sst2"], [str(tmp_path)])
    (folder,) = harness_folders(["both"], [str(tmp_path)])  # for the member that the harness has
    assert folder.endswith("glue/sst2") and harness_folders(["a"], [str(tmp_path)]) == [folder]
    assert "did you mean both" in refusal("bothh", folders=(str(tmp_path),))
    assert refusal("a", folders=("nowhere",)) == "--include-path nowhere: no such folder."


def test_a_harness_that_is_not_there_has_no_tasks(monkeypatch):
    monkeypatch.setattr("megatron_peft.evaluation.task_names.find_spec", lambda name: None)
    harness_files.cache_clear()
    try:
        assert harness_files() == {}
    finally:
        harness_files.cache_clear()
