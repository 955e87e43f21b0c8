"""Chat templates: programs of Jinja that write a conversation as text. They are looked at before they are used."""

from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from megatron_peft.config import ConfigurationError
from megatron_peft.config.templates import render
from megatron_peft.config.untrusted import parse_json, read_text, require_regular


def read_chat_template(given: str) -> str:
    """The text of --chat-template, which is that text (any template has a brace), or a file. ConfigurationError: the
    file cannot be read, or it is no template."""
    text = given
    if "{" not in given:
        require_regular(Path(given), "--chat-template")
        text = read_text(Path(given))
    try:
        template_inputs(text)
    except ConfigurationError as error:
        raise ConfigurationError(f"--chat-template {given if text != given else ''}: {error}") from error
    return text


class TemplateInputs(NamedTuple):
    """What a chat template reads."""

    variables: frozenset[str]  # messages, tools, ...
    fields: frozenset[str]  # possibly, of a message: attributes and strings of its code, not of its comments


@lru_cache
def template_inputs(template: str) -> TemplateInputs:
    """Raises ConfigurationError for a template that is not valid."""
    try:
        variables, fields = parse_json(render("inputs", template, {}), "what it reads")
    except ConfigurationError as error:
        raise ConfigurationError(f"the chat template cannot be read: {str(error).rstrip('.')}.") from error
    return TemplateInputs(frozenset(variables), frozenset(fields))
