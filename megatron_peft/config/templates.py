"""Jinja templates of task files, rendered in jinja2's sandbox; transformers renders chat templates in the same one."""

import re
from collections.abc import Mapping
from functools import cache
from typing import Any

from jinja2 import StrictUndefined, Template
from jinja2.sandbox import ImmutableSandboxedEnvironment

from megatron_peft.config.errors import ConfigurationError


def render_task(template: str, values: Mapping[str, Any]) -> str:
    """Render a template of an lm-eval task file with plain copies of `values`.

    Raises:
        ConfigurationError: the template is malformed, reads what is undefined, or what the sandbox forbids.
    """
    try:
        return _compiled(template).render(_plain(values))
    except Exception as error:  # noqa: BLE001 - a template is a program
        raise ConfigurationError(str(error) or type(error).__name__) from error


@cache
def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
    environment.filters["regex_replace"] = lambda text, pattern, repl, count=0: re.sub(pattern, repl, text, count=count)
    return environment


@cache
def _compiled(template: str) -> Template:
    return _environment().from_string(template)


def _plain(value: Any) -> Any:
    """Copy a value without objects, whose methods (an image's `save`) a template could call."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {_plain(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_plain, value)) if type(value) in (list, tuple) else [*map(_plain, value)]
    return _plain(value.tolist()) if hasattr(value, "tolist") else str(value)
