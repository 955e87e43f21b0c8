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
    told = refusal("hellaswagg", "qqqqqqqq", "sst2", "mmlu")
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
    assert "did you mean both" in refusal("bothh", folders=(str(tmp_path),))
    assert refusal("a", folders=("nowhere",)) == "--include-path nowhere: no such folder."
