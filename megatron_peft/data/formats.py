"""Formats of records: which fields a file has, by its first record, and what they become.

Whatever a record looks like, it becomes one of three kinds: a prompt with a completion, a conversation, or a text.
"""

from collections.abc import Callable
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
    """--prompt-column and its like: names of fields. Without any, the usual names decide the format."""

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

    name: for messages to the user.
    kind: what a record becomes.
    required: fields that each record has.
    optional: fields that are read if they are there.
    convert: takes the fields that are there, and returns those of NATIVE_FIELDS ("tools" may be missing).
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
        taken = {*read, *NATIVE_FIELDS[self.kind]}
        return {**{name: value for name, value in record.items() if name not in taken}, **self.convert(read)}


NATIVE_FIELDS = {"prompt": ("prompt", "completion"), "messages": ("messages", "tools"), "text": ("text",)}


@lru_cache
def format_of(fields: tuple[str, ...], columns: ColumnNames, has_chat_template: bool) -> RecordFormat:
    """The format of a file whose first record has these fields.

    has_chat_template: Alpaca records are then conversations; otherwise they get Alpaca's own prompt.
    Raises ConfigurationError (without the place) that names the fields, and the flags that say which is which.
    """
    if columns != ColumnNames():
        return _of_columns(fields, columns)
    formats = (
        _plain("messages", "messages"),
        _plain("prompt", "prompt", "completion"),
        _SHAREGPT,
        _ALPACA_CHAT if has_chat_template else _ALPACA,
        _plain("text", "text"),
    )
    for candidate in formats:
        if set(candidate.required) <= set(fields):
            return candidate
    require(
        not {"chosen", "rejected"} <= set(fields),
        'the record is a preference pair ("chosen" and "rejected"): there is no preference loss (DPO) here. To train '
        "on the chosen answers alone: --prompt-column prompt --response-column chosen, or --messages-column chosen "
        "where they are conversations.",
    )
    for candidate in formats:
        if set(candidate.required) & set(fields):  # `native` says which field is missing
            return candidate
    prompt, response = (*fields, "NAME", "NAME")[:2]
    raise ConfigurationError(
        f'the record has the fields {", ".join(fields) or "(none)"}, but neither "prompt" and "completion", nor '
        f'"messages", "conversations" (ShareGPT), "instruction" and "output" (Alpaca) or "text". Name its own: '
        f"--prompt-column {prompt} --response-column {response}, --messages-column NAME or --text-column NAME."
    )


def _of_columns(fields: tuple[str, ...], columns: ColumnNames) -> RecordFormat:
    """The format that the user's flags name. Raises ConfigurationError for a field that is not there."""
    if columns.messages:
        chosen = _plain("messages", columns.messages)
    elif columns.text:
        chosen = _plain("text", columns.text)
    else:
        chosen = _plain("prompt", columns.prompt or "prompt", columns.response or "completion")
    flags = {getattr(columns, name): flag(f"{name}_column") for name in ("prompt", "response", "messages", "text")}
    for name in chosen.required:
        require(
            name in fields,
            f'{flags.get(name, "the record")}: there is no field "{name}"; the record has {", ".join(fields)}.',
        )
    return chosen


def _plain(kind: Kind, *columns: str) -> RecordFormat:
    """The format with this package's fields in these columns."""
    shown = " and ".join(f'"{column}"' for column in columns)
    if kind == "messages":
        return RecordFormat(shown, kind, columns, ("tools",), partial(_conversation, columns[0]))
    names = dict(zip(NATIVE_FIELDS[kind], columns, strict=True))
    return RecordFormat(shown, kind, columns, (), lambda record: {ours: record[names[ours]] for ours in names})


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
    native: Record = {"messages": [*([{"role": "system", "content": system}] if system else []), *messages]}
    if "tools" in record:
        tools = record["tools"]  # some write the list as a text
        is_text = isinstance(tools, str) and tools.lstrip().startswith("[")
        native["tools"] = parse_json(tools, '"tools"') if is_text else tools
    return native


def plain_turn(number: int, turn: Any) -> Any:
    """A turn with role and content; what is neither of the two forms stays, and is refused where turns are checked.

    Raises ConfigurationError for a content with an image, for instance, and for an unknown speaker.
    """
    if isinstance(turn, dict) and turn.get("content") and isinstance(turn["content"], list):
        for part in turn["content"]:
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            require(
                kind == "text" and isinstance(part.get("text"), str),
                f'"content" of message {number} has a part of type {kind}: a model is trained on text alone, as '
                '{"type": "text", "text": "..."}. Leave the record out.',
            )
        turn = {**turn, "content": "".join(part["text"] for part in turn["content"])}
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


# Alpaca: "instruction", "input" (may be empty) and "output"; some files have "system" and "history", earlier turns.
_REQUIRED, _EXTRAS = ("instruction", "output"), ("input", "system", "history")


def _alpaca_chat(record: Record) -> Record:
    system, history, given = (record.get(name) for name in ("system", "history", "input"))
    require(
        not history
        or (isinstance(history, list) and all(isinstance(turn, list) and len(turn) == 2 for turn in history)),
        '"history" is not a list of pairs, a question and its answer.',
    )
    request = f"{record['instruction']}\n\n{given}" if given else record["instruction"]
    messages = [{"role": "system", "content": system}] if system else []
    for question, answer in (*(history or ()), (request, record["output"])):
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages}


def _alpaca(record: Record) -> Record:
    """A record with the prompt of Alpaca's authors, as `megatron-peft data prepare instructions` writes it."""
    extra = [name for name in ("system", "history") if record.get(name)]
    require(
        not extra,
        f'the record has "{extra[0] if extra else ""}", which Alpaca\'s prompt has no place for: give --chat-template, '
        "or a --tokenizer-model with one.",
    )
    fields = {"instruction": record["instruction"], "input": record.get("input") or ""}
    return {"prompt": render("task", ALPACA_PROMPT, fields), "completion": record["output"]}


# As in `tasks/templates/instructions.yaml`.
ALPACA_PROMPT = (
    "Below is an instruction that describes a task{{', paired with an input that provides further context' if input "
    "else ''}}. Write a response that appropriately completes the request.\n\n### Instruction:\n{{instruction}}\n"
    "{{'\n### Input:\n' ~ input ~ '\n' if input else ''}}\n### Response:\n"
)


_ALPACA = RecordFormat("Alpaca, with Alpaca's prompt", "prompt", _REQUIRED, _EXTRAS, _alpaca)
_ALPACA_CHAT = RecordFormat("Alpaca, as a conversation", "messages", _REQUIRED, _EXTRAS, _alpaca_chat)
_SHAREGPT = RecordFormat(
    "ShareGPT", "messages", ("conversations",), ("system", "tools"), partial(_conversation, "conversations")
)
