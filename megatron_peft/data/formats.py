"""Formats of records: which fields a file has, by its first record, and what they become.

Whatever a record looks like, it becomes one of three kinds: a prompt with a completion, a conversation, or a text.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Literal

from megatron_peft.config import ConfigurationError, DataConfig, flag, require
from megatron_peft.config.templates import render
from megatron_peft.config.untrusted import parse_json

Record = dict[str, Any]
Kind = Literal["prompt", "messages", "text"]


@dataclass(frozen=True)
class ColumnNames:
    """--prompt-column and its like: names of fields. Without any, the format is found by the usual names."""

    prompt: str | None = None
    response: str | None = None
    messages: str | None = None
    text: str | None = None

    @classmethod
    def of(cls, config: DataConfig) -> "ColumnNames":
        return cls(config.prompt_column, config.response_column, config.messages_column, config.text_column)


@dataclass(frozen=True)
class RecordFormat:
    """How the records of a file are read.

    Args:
        name: for messages to the user.
        kind: what a record becomes.
        required: fields that each record has.
        optional: fields that are read if they are there.
        convert: takes the fields that are there, and returns "prompt" and "completion"; "messages" and maybe "tools";
            or "text".
    """

    name: str
    kind: Kind
    required: tuple[str, ...]
    optional: tuple[str, ...]
    convert: Callable[[Record], Record]

    def native(self, record: Record) -> Record:
        """The record with this package's field names; fields that the format does not read stay.

        Raises ConfigurationError (without the place) for a record of another format.
        """
        missing = [name for name in self.required if name not in record]
        require(
            not missing,
            f'lacks the field "{missing[0] if missing else ""}" (it has {", ".join(record) or "none"}); all records of '
            f"a file have the format of its first one, here {self.name}.",
        )
        read = {name: record[name] for name in (*self.required, *self.optional) if name in record}
        rest = {name: value for name, value in record.items() if name not in read and name not in _NATIVE[self.kind]}
        return {**rest, **self.convert(read)}


_NATIVE = {"prompt": ("prompt", "completion"), "messages": ("messages", "tools"), "text": ("text",)}


@lru_cache
def format_of(fields: tuple[str, ...], columns: ColumnNames, has_chat_template: bool) -> RecordFormat:
    """The format of a file whose first record has these fields.

    has_chat_template: Alpaca records are then conversations; otherwise they get Alpaca's own prompt.
    Raises ConfigurationError (without the place) that names the fields, and the flags that say which is which.
    """
    if columns != ColumnNames():
        return _of_columns(fields, columns)
    formats = (
        _renamed("messages", messages="messages"),
        _renamed("prompt", prompt="prompt", completion="completion"),
        _SHAREGPT,
        _ALPACA_CHAT if has_chat_template else _ALPACA,
        _renamed("text", text="text"),
    )
    whole = [one for one in formats if set(one.required) <= set(fields)]
    if whole:
        return whole[0]
    require(
        not {"chosen", "rejected"} <= set(fields),
        'the record is a preference pair ("chosen" and "rejected"): there is no preference loss (DPO) here. To train '
        "on the chosen answers alone: --prompt-column prompt --response-column chosen, or --messages-column chosen "
        "where they are conversations.",
    )
    begun = [one for one in formats if set(one.required) & set(fields)]
    if begun:
        return begun[0]
    raise ConfigurationError(
        f'the record has the fields {", ".join(fields) or "(none)"}, but neither "prompt" and "completion", nor '
        f'"messages", "conversations" (ShareGPT), "instruction" and "output" (Alpaca) or "text". Name its own: '
        f"{_proposal(fields)}."
    )


def _proposal(fields: tuple[str, ...]) -> str:
    prompt, response = (*fields, "NAME", "NAME")[:2]
    return f"--prompt-column {prompt} --response-column {response}, --messages-column NAME or --text-column NAME"


def _of_columns(fields: tuple[str, ...], columns: ColumnNames) -> RecordFormat:
    """The format that the user's flags name. Raises ConfigurationError for a field that is not there."""
    if columns.messages:
        found = _renamed("messages", messages=columns.messages)
    elif columns.text:
        found = _renamed("text", text=columns.text)
    else:
        found = _renamed("prompt", prompt=columns.prompt or "prompt", completion=columns.response or "completion")
    flags = {getattr(columns, name): flag(f"{name}_column") for name in ("prompt", "response", "messages", "text")}
    for name in found.required:
        require(
            name in fields,
            f'{flags.get(name, "the record")}: there is no field "{name}"; the record has {", ".join(fields)}.',
        )
    return found


def _renamed(kind: Kind, **names: str) -> RecordFormat:
    """Our names -> those of the record."""
    shown = " and ".join(f'"{name}"' for name in names.values())
    if kind == "messages":
        column = names["messages"]
        return RecordFormat(shown, kind, (column,), ("tools",), partial(_conversation, column))
    return RecordFormat(shown, kind, tuple(names.values()), (), partial(_rename, names))


def _rename(names: Mapping[str, str], record: Record) -> Record:
    return {ours: record[theirs] for ours, theirs in names.items()}


# ShareGPT: turns with "from" and "value". Its names of who speaks -> ours.
ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "model"), "assistant"),
    "system": "system",
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
}


def _conversation(column: str, record: Record) -> Record:
    turns = record[column]
    if not isinstance(turns, list) or not turns:
        raise ConfigurationError(f'"{column}" is not a list of objects with "role" and "content", or it is empty.')
    system = record.get("system")
    messages = [plain_turn(number, turn) for number, turn in enumerate(turns, 1)]
    found: Record = {"messages": [*([{"role": "system", "content": system}] if system else []), *messages]}
    if "tools" in record:
        tools = record["tools"]  # some write the list as a text
        is_text = isinstance(tools, str) and tools.lstrip().startswith("[")
        found["tools"] = parse_json(tools, '"tools"') if is_text else tools
    return found


def plain_turn(number: int, turn: Any) -> Any:
    """A turn with role and content; what is neither of the two forms stays, and is refused where turns are checked."""
    if isinstance(turn, dict) and turn.get("content") and isinstance(turn["content"], list):
        turn = {**turn, "content": _joined(number, turn["content"])}
    if not isinstance(turn, dict) or "from" not in turn or "role" in turn:
        return turn
    speaker = turn["from"]
    require(
        isinstance(speaker, str) and speaker in ROLES,
        f"message {number} is from {speaker!r}; known are {', '.join(ROLES)}. Write a call of a function as "
        '"tool_calls" of an assistant\'s message, in "messages".',
    )
    require("value" in turn, f'message {number} lacks the field "value" (it has {", ".join(turn)}).')
    rest = {name: value for name, value in turn.items() if name not in ("from", "value")}
    return {"role": ROLES[speaker], "content": turn["value"], **rest}


def _joined(number: int, parts: list[Any]) -> str:
    """The text of a content that is written in parts. ConfigurationError: a part is an image, for instance."""
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        require(
            kind == "text" and isinstance(part.get("text"), str),
            f'"content" of message {number} has a part of type {kind}: a model is trained on text alone, as '
            '{"type": "text", "text": "..."}. Leave the record out.',
        )
    return "".join(part["text"] for part in parts)


# Alpaca: "instruction", "input" (may be empty) and "output"; some files have "system" and "history", earlier turns.
_EXTRAS = ("input", "system", "history")


def _alpaca_chat(record: Record) -> Record:
    system, turns = record.get("system"), [*_history(record), (_request(record), record["output"])]
    messages = [{"role": "system", "content": system}] if system else []
    for question, answer in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages}


def _history(record: Record) -> list[tuple[Any, Any]]:
    history = record.get("history") or []
    whole = isinstance(history, list) and all(isinstance(turn, list) and len(turn) == 2 for turn in history)
    require(whole, '"history" is not a list of pairs, a question and its answer.')
    return [(question, answer) for question, answer in history]


def _request(record: Record) -> Any:
    given = record.get("input")
    return f"{record['instruction']}\n\n{given}" if given else record["instruction"]


def _alpaca(record: Record) -> Record:
    """With the prompt of Alpaca's authors, as `megatron-peft data prepare instructions` writes it."""
    extra = [name for name in ("system", "history") if record.get(name)]
    require(
        not extra,
        f'the record has "{extra[0] if extra else ""}", which Alpaca\'s prompt has no place for: give --chat-template, '
        "or a --tokenizer-model with one.",
    )
    asked = {"instruction": record["instruction"], "input": record.get("input") or ""}
    return {"prompt": render("task", ALPACA_PROMPT, asked), "completion": record["output"]}


# As in `tasks/templates/instructions.yaml`.
ALPACA_PROMPT = (
    "Below is an instruction that describes a task{{', paired with an input that provides further context' if input "
    "else ''}}. Write a response that appropriately completes the request.\n\n### Instruction:\n{{instruction}}\n"
    "{{'\n### Input:\n' ~ input ~ '\n' if input else ''}}\n### Response:\n"
)


_REQUIRED = ("instruction", "output")
_ALPACA = RecordFormat("Alpaca, with Alpaca's prompt", "prompt", _REQUIRED, _EXTRAS, _alpaca)
_ALPACA_CHAT = RecordFormat("Alpaca, as a conversation", "messages", _REQUIRED, _EXTRAS, _alpaca_chat)
_SHAREGPT = RecordFormat(
    "ShareGPT", "messages", ("conversations",), ("system", "tools"), partial(_conversation, "conversations")
)
