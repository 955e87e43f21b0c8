"""A task of lm-evaluation-harness as training reads it: what turns an item into a prompt and a completion."""

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from megatron_peft.config import ConfigurationError, require
from megatron_peft.config.templates import render
from megatron_peft.config.untrusted import parse_yaml, read_text

TASKS = Path(__file__).parent / "templates"
DEFAULT_DELIMITER = " "  # the harness's, between prompt and target


class TaskLoader(yaml.SafeLoader):
    """YAML in which `!function NAME` is the name. Some of the harness's own files have a key twice."""


TaskLoader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))  # type: ignore[arg-type]


def split_task_file(text: str) -> tuple[str, str]:
    """(where the items come from, the task of the harness): what stands above the first line --- and what below."""
    declared, line, task = text.partition("\n---\n")
    return (declared, task) if line else ("", text)


class TaskTemplate:
    """The task `name` of the harness, read for training as well: training prompts and completions are rendered exactly
    as the harness renders them. `changes` (old text -> new) are made in the text of the file, folder/NAME.yaml.
    """

    def __init__(self, name: str, changes: Mapping[str, str] | None = None, folder: Path = TASKS) -> None:
        self.name = name
        _, self.text = split_task_file(read_text(folder / f"{name}.yaml"))
        for old, new in (changes or {}).items():
            require(self.text.count(old) == 1, f"the template {name} does not hold {old!r} once.")
            self.text = self.text.replace(old, new)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The task as the harness reads it. Raises ConfigurationError: it makes no prompt or no completion."""
        settings = parse_yaml(self.text, f"the template {self.name}", TaskLoader)
        for key in ("task", "doc_to_text", "doc_to_target"):
            has_text = isinstance(settings, dict) and isinstance(settings.get(key), str)
            require(has_text, f"the template {self.name} has no text for {key}.")
        return settings

    @property
    def task(self) -> str:
        """Name of the task in the harness."""
        return self.settings["task"]

    def prompt(self, fields: Mapping[str, Any]) -> str:
        """The text before the model."""
        return self._render("doc_to_text", fields)

    def completion(self, fields: Mapping[str, Any]) -> str:
        """The right answer after it: the right choice, or the target text, after the delimiter."""
        target = self.settings["doc_to_target"]
        answer = fields[target] if target in fields else self._render("doc_to_target", fields)
        if choices := self.settings.get("doc_to_choice"):
            require(
                str(answer) in map(str, range(len(choices))),
                f"the template {self.name}: doc_to_target is {answer}, and doc_to_choice has {len(choices)} choices.",
            )
            answer = choices[int(answer)]
        return self.settings.get("target_delimiter", DEFAULT_DELIMITER) + str(answer)

    def filled(self, data_files: Mapping[str, Path]) -> str:
        """The task file whose data are `data_files` (split -> JSON lines), by absolute path."""
        lines = [f"    {split}: {json.dumps(str(path.absolute()))}" for split, path in data_files.items()]
        return "\n".join([self.text.rstrip(), "dataset_path: json", "dataset_kwargs:", "  data_files:", *lines, ""])

    def _render(self, key: str, fields: Mapping[str, Any]) -> str:
        try:
            return render("task", self.settings[key], fields)
        except ConfigurationError as error:
            raise ConfigurationError(f"the template {self.name}: {key} fails: {error}") from error
