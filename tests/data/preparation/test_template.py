"""Templates are read as the harness reads them."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import pytest
import yaml
from jinja2 import UndefinedError

from megatron_peft.config_error import ConfigurationError
from megatron_peft.data.preparation.template import PACKAGE, TaskTemplate

FIELDS = {"premise": "It rains.", "hypothesis": " It is wet", "label": 1}


def test_choice_is_prompted_and_answered() -> None:
    template = TaskTemplate("glue_mnli")
    assert template.prompt(FIELDS) == "It rains.\nQuestion: It is wet. True, False or Neither?\nAnswer:"
    assert template.completion(FIELDS) == " Neither"


def test_generated_answer_follows_the_delimiter() -> None:
    fields = {"source": "Open", "target": "Ouvrir", "source_language": "English", "target_language": "French"}
    assert TaskTemplate("translation").completion(fields) == " Ouvrir"
    assert TaskTemplate("humaneval_greedy").completion({"canonical_solution": "    return 1"}) == "    return 1"


def test_input_of_an_instruction_is_optional() -> None:
    template = TaskTemplate("instructions")
    with_input = template.prompt({"instruction": "Add.", "input": "1 2"})
    assert with_input.endswith("### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n")
    assert template.prompt({"instruction": "Add.", "input": ""}).endswith("Add.\n\n### Response:\n")


def test_missing_field_is_not_silently_empty() -> None:
    with pytest.raises(UndefinedError):
        TaskTemplate("glue_qqp").prompt({"question1": "What?"})


def test_filled_task_names_its_data(tmp_path: Path) -> None:
    text = TaskTemplate("glue_qqp").filled({"test": tmp_path / 'a "b".jsonl'})
    task = yaml.safe_load(text)
    assert task["dataset_path"] == "json"
    assert task["dataset_kwargs"] == {"data_files": {"test": str(tmp_path / 'a "b".jsonl')}}
    assert text.startswith("# QQP of GLUE")


def test_change_that_does_not_apply_is_an_error() -> None:
    assert TaskTemplate("glue_qqp", {"task: glue_qqp": "task: mine"}).task == "mine"
    with pytest.raises(ConfigurationError, match="does not hold 'repeats: 20' once"):
        TaskTemplate("glue_qqp", {"repeats: 20": "repeats: 5"})


def test_every_template_is_named_like_its_task() -> None:
    names = [path.name.removesuffix(".yaml") for path in files(PACKAGE).joinpath("tasks").iterdir()]
    assert len(names) == 10
    assert [name for name in names if TaskTemplate(name).task != name] == []
