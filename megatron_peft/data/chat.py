"""Cut a rendered conversation into what the assistant says and the rest, for any chat template."""

from collections.abc import Callable, Sequence
from os.path import commonprefix
from typing import Any, NamedTuple

from megatron_peft.config import ConfigurationError


class Part(NamedTuple):
    """A stretch of text, and whether the loss counts its tokens."""

    text: str
    trained: bool


def chat_parts(render: Callable[..., str], messages: Sequence[Any]) -> list[Part]:
    """Parts whose texts join to `render(messages)`; an assistant's turn begins after its generation prompt.

    Templates say nowhere where a turn begins, so each boundary is found by rendering what comes before it. That
    works only for templates that write a conversation from left to right; `ConfigurationError` for the others, and
    for a conversation in which the assistant never speaks.
    """
    whole = render(messages)
    parts: list[Part] = []
    position = 0
    for turn in (i for i, message in enumerate(messages) if message["role"] == "assistant"):
        start = _turn_start(render, whole, messages[:turn]) if turn else 0
        end = _prefix_length(whole, render(messages[: turn + 1])) if turn + 1 < len(messages) else len(whole)
        if not position <= start <= end:
            raise ConfigurationError(_NOT_LEFT_TO_RIGHT)
        parts += [Part(whole[position:start], False), Part(whole[start:end], True)]
        position = end
    if not parts:
        raise ConfigurationError('no message has the role "assistant", so there is nothing to learn.')
    return [*parts, Part(whole[position:], False)]


def _turn_start(render: Callable[..., str], whole: str, before: Sequence[Any]) -> int:
    """Behind the generation prompt, or behind as much of it as the turn has: some templates put into the prompt what
    they leave out of a finished turn (an opened thought)."""
    prompt = render(before, True)
    if whole.startswith(prompt):
        return len(prompt)
    return max(_prefix_length(whole, render(before)), len(commonprefix([whole, prompt])))


def _prefix_length(whole: str, prefix: str) -> int:
    if not whole.startswith(prefix):
        raise ConfigurationError(_NOT_LEFT_TO_RIGHT)
    return len(prefix)


_NOT_LEFT_TO_RIGHT = (
    "the chat template renders a turn otherwise when others follow it, so the assistant's tokens cannot be told "
    "apart: split the conversation into records of one answer each, or use records with prompt and completion."
)
