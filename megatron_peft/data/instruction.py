"""Records of instruction data as token ids, with the loss on completions only.

Three kinds of record: `{"prompt", "completion"}` (loss on the completion), `{"messages": [{"role", "content"}]}`
(through the chat template; loss on what the assistant says) and `{"text"}` (loss on everything). What is learnt ends
with the end-of-sequence token. A conversation may come with `tools`, and an assistant's turn with `tool_calls`: the
template writes them. Other fields are left out, unless the template would read them: that is an error.
"""

import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from jinja2 import TemplateError, meta
from jinja2.sandbox import SandboxedEnvironment

from megatron_peft.config import ConfigurationError, require
from megatron_peft.data.chat import Part
from megatron_peft.data.jsonl import Record
from megatron_peft.data.tokenizers import Tokenizer


class TokenizedRecord(NamedTuple):
    """The whole record, before any cut: ids, and which of them the loss counts."""

    ids: list[int]
    trained: list[bool]


def tokenize_record(record: Record, tokenizer: Tokenizer) -> TokenizedRecord:
    """Tokens of one record. Raises ConfigurationError (without the place) for one that is not of the three kinds."""
    kind = next((kind for kind in _KINDS if kind in record), None)
    require(
        kind is not None,
        f'the record has the fields {", ".join(record) or "(none)"}, but neither "prompt" and "completion", nor '
        '"messages", nor "text".',
    )
    return _KINDS[str(kind)](record, tokenizer)


def encode_parts(encode: Callable[[str], list[int]], texts: Sequence[str]) -> list[list[int]]:
    """Ids of each part of one text, such that the ids before a boundary are those of the text before it.

    A model that generates has seen exactly the ids of its prompt, so training must show it the same. Where the
    tokenizer agrees, the ids are also those of the joined text (a sentencepiece model would otherwise begin each part
    with a space); where a token would straddle the boundary, the part is tokenized by itself.
    """
    parts: list[list[int]] = []
    ids: list[int] = []
    joined = ""
    for text in texts:
        joined += text
        whole = encode(joined) if text else ids
        part = whole[len(ids) :] if whole[: len(ids)] == ids else encode(text)
        parts.append(part)
        ids = ids + part
    return parts


def _tokenize_completion(record: Record, tokenizer: Tokenizer) -> TokenizedRecord:
    prompt, completion = _text(record, "prompt"), _text(record, "completion")
    prompt_ids, completion_ids = encode_parts(tokenizer.encode, [prompt, completion])
    before = _bos(tokenizer) + prompt_ids
    after = [*completion_ids, tokenizer.eos_id]
    return TokenizedRecord(before + after, [False] * len(before) + [True] * len(after))


def _tokenize_text(record: Record, tokenizer: Tokenizer) -> TokenizedRecord:
    ids = [*_bos(tokenizer), *tokenizer.encode(_text(record, "text")), tokenizer.eos_id]
    return TokenizedRecord(ids, [True] * len(ids))


def _tokenize_messages(record: Record, tokenizer: Tokenizer) -> TokenizedRecord:
    """The template writes the special tokens itself, so none is put before, and one after only if it is missing."""
    wanted = sorted(template_names(tokenizer.chat_template) & record.keys() - {"messages", "tools"})
    require(
        not wanted,
        f"the chat template reads {', '.join(wanted)}, which the record has but which is not handed over: write it "
        "into the messages, or rename the field.",
    )
    parts = tokenizer.chat_parts(_messages(record, tokenizer), _tools(record))
    pieces = encode_parts(tokenizer.encode, [part.text for part in parts])
    last_turn = max(i for i, part in enumerate(parts) if part.trained)
    if tokenizer.eos_id not in pieces[last_turn]:
        pieces[last_turn] = [*pieces[last_turn], tokenizer.eos_id]
    trained = [flag for part, ids in zip(parts, pieces, strict=True) for flag in _turn_mask(part, ids, tokenizer)]
    return TokenizedRecord([i for ids in pieces for i in ids], trained)


def _turn_mask(part: Part, ids: list[int], tokenizer: Tokenizer) -> list[bool]:
    """A turn is learnt up to its end token; what the template puts behind it (a line break) is not."""
    if not part.trained:
        return [False] * len(ids)
    end = len(ids) - ids[::-1].index(tokenizer.eos_id) if tokenizer.eos_id in ids else len(ids)
    return [i < end for i in range(len(ids))]


def _bos(tokenizer: Tokenizer) -> list[int]:
    return [] if tokenizer.bos_id is None else [tokenizer.bos_id]


def _text(record: Record, name: str) -> str:
    require(name in record, f'lacks the field "{name}" (it has {", ".join(record)}).')
    return _string(record[name], f'"{name}"')


def _string(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise ConfigurationError(f"{name} is not text but {type(value).__name__}.")
    return value


def _messages(record: Record, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    messages = record["messages"]
    if not isinstance(messages, list) or not messages:
        raise ConfigurationError('"messages" is not a list of objects with "role" and "content", or it is empty.')
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict):
            raise ConfigurationError(f"message {number} is not an object but {type(message).__name__}.")
        calls = message.get("tool_calls")
        if calls:
            require(
                "tool_calls" in tokenizer.chat_template,
                f"message {number} has tool_calls, which the tokenizer's chat template does not write: give "
                "--tokenizer-model a folder whose template does.",
            )
        for name in ("role",) if calls and message.get("content") is None else ("role", "content"):
            require(name in message, f'message {number} lacks the field "{name}".')
            _string(message[name], f'"{name}" of message {number}')
    return messages


def _tools(record: Record) -> list[dict[str, Any]] | None:
    tools = record.get("tools")
    if tools is None:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ConfigurationError('"tools" is not a list of objects, each the JSON schema of a function.')
    return tools


@lru_cache
def template_names(template: str) -> frozenset[str]:
    """What a chat template reads beside its own variables: `messages`, `tools`, ... Raises ConfigurationError."""
    try:
        plain = re.sub(r"{%-?\s*(end)?generation\s*-?%}", "", template)  # a tag of transformers' own
        return frozenset(meta.find_undeclared_variables(_TEMPLATES.parse(plain)))
    except (TemplateError, RecursionError) as error:
        raise ConfigurationError(f"the chat template cannot be read: {error}.") from error


def fields_left_out(record: Record, tokenizer: Tokenizer) -> list[str]:
    """Fields of a record that nothing reads."""
    kind = next(kind for kind in _KINDS if kind in record)
    read = {"messages"} | ({"tools"} & template_names(tokenizer.chat_template))
    return [name for name in record if name not in (read if kind == "messages" else _FIELDS[kind])]


_TEMPLATES = SandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"])
_FIELDS = {"prompt": {"prompt", "completion"}, "completion": {"prompt", "completion"}, "text": {"text"}}
_KINDS: dict[str, Callable[[Record, Tokenizer], TokenizedRecord]] = {
    "messages": _tokenize_messages,
    "prompt": _tokenize_completion,
    "completion": _tokenize_completion,
    "text": _tokenize_text,
}
