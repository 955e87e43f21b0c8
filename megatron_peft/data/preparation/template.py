"""How a document is asked and answered: the task file of lm-evaluation-harness, read for training as well.

So a training prompt is what the harness puts before the model, and a completion is what it scores.
"""

import json
from collections.abc import Mapping
from functools import cache, cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, StrictUndefined, Template

from megatron_peft.config import require
from megatron_peft.config.untrusted import parse_yaml

_JINJA = Environment(undefined=StrictUndefined, keep_trailing_newline=True)  # the harness's settings
PACKAGE = "megatron_peft.data.preparation"
DEFAULT_DELIMITER = " "  # the harness's, between prompt and target


class TaskLoader(yaml.SafeLoader):
    """YAML in which `!function NAME` is the name."""


TaskLoader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))  # type: ignore[arg-type]


class TaskTemplate:
    """The template of the task `name`: its text with `changes` (old text -> new) made in it."""

    def __init__(self, name: str, changes: Mapping[str, str] | None = None) -> None:
        self.name = name
        self.text = files(PACKAGE).joinpath("tasks", f"{name}.yaml").read_text(encoding="utf-8")
        for old, new in (changes or {}).items():
            require(self.text.count(old) == 1, f"the template {name} does not hold {old!r} once.")
            self.text = self.text.replace(old, new)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The template as the harness reads it."""
        return parse_yaml(self.text, f"the template {self.name}", TaskLoader)

    @property
    def task(self) -> str:
        return self.settings["task"]

    def prompt(self, fields: Mapping[str, Any]) -> str:
        """The text before the model."""
        return _render(self.settings["doc_to_text"], fields)

    def completion(self, fields: Mapping[str, Any]) -> str:
        """The right answer after it: the right choice, or the target text, after the delimiter."""
        target = self.settings["doc_to_target"]
        answer = fields[target] if target in fields else _render(target, fields)
        if choices := self.settings.get("doc_to_choice"):
            answer = choices[int(answer)]
        return self.settings.get("target_delimiter", DEFAULT_DELIMITER) + str(answer)

    def filled(self, data_files: Mapping[str, Path]) -> str:
        """The task file whose data are `data_files` (split -> JSON lines), by absolute path."""
        lines = [f"    {split}: {json.dumps(str(path.absolute()))}" for split, path in data_files.items()]
        return "\n".join([self.text.rstrip(), "dataset_path: json", "dataset_kwargs:", "  data_files:", *lines, ""])


def _render(template: str, fields: Mapping[str, Any]) -> str:
    return _compiled(template).render(**fields)


@cache
def _compiled(template: str) -> Template:
    return _JINJA.from_string(template)
