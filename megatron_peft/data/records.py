"""Records: the format of a file, by its first record's fields, and the token ids of a record with what the loss counts.

Whatever a record looks like, it becomes one of three kinds: a prompt with a completion, a conversation, or a text.
docs/data.md has the formats. Imports no torch: the preview reads records with it in seconds.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Literal, NamedTuple

from megatron_peft.config import ConfigurationError, DataConfig, flag, require
from megatron_peft.config.untrusted import parse_json
from megatron_peft.data.files import Record, RecordFiles
from megatron_peft.data.samples import Sample, sample_from_ids
from megatron_peft.data.tokenizers import Tokenizer, split_chat, template_inputs

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
    """How the records of a file are read."""

    name: str  # for messages to the user
    kind: Kind  # what a record becomes
    required: tuple[str, ...]  # fields that each record has
    optional: tuple[str, ...]  # fields that are read if they are there
    convert: Callable[[Record], Record]  # from these fields to those of NATIVE_FIELDS ("tools" may be missing)

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
        return RecordFormat(shown, kind, columns, ("system", "tools"), partial(conversation, columns[0]))
    names = dict(zip(NATIVE_FIELDS[kind], columns, strict=True))
    return RecordFormat(shown, kind, columns, (), lambda record: {ours: record[names[ours]] for ours in names})


# ShareGPT: turns with "from" and "value". Its names of who speaks -> ours.
SPEAKERS = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "model"), "assistant"),
}  # also as the roles of messages; the other roles may be those of a chat template
ROLES = {**SPEAKERS, "system": "system", **dict.fromkeys(("tool", "observation", "function_response"), "tool")}


def conversation(column: str, record: Record) -> Record:
    """Return the "messages" of a record and its "tools". Raises ConfigurationError.

    Its "system" text comes first, unless the messages begin with one.
    """
    turns = record[column]
    if not isinstance(turns, list) or not turns:
        raise ConfigurationError(f'"{column}" is not a list of objects with "role" and "content", or it is empty.')
    system = record.get("system")
    messages = [plain_turn(number, turn) for number, turn in enumerate(turns, 1)]
    has_own = isinstance(messages[0], dict) and messages[0].get("role") == "system"
    first = [{"role": "system", "content": system}] if system and not has_own else []
    native: Record = {"messages": [*first, *messages]}
    if "tools" in record:
        tools = record["tools"]  # some write the list as a text
        is_text = isinstance(tools, str) and tools.lstrip().startswith("[")
        native["tools"] = tools = parse_json(tools, '"tools"') if is_text else tools
        require(
            tools is None or (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)),
            '"tools" is not a list of objects, each the JSON schema of a function.',
        )
    return native


def plain_turn(number: int, turn: Any) -> Any:
    """Return the turn with role and content; any other form stays as it is, and is refused where turns are checked.

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
    if isinstance(turn, dict) and isinstance(turn.get("role"), str):
        return {**turn, "role": SPEAKERS.get(turn["role"], turn["role"])}
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
    given = record.get("input")
    context = ", paired with an input that provides further context" if given else ""
    prompt = (  # as in tasks/templates/instructions.yaml
        f"Below is an instruction that describes a task{context}. Write a response that appropriately completes the "
        f"request.\n\n### Instruction:\n{record['instruction']}\n"
    )
    prompt += f"\n### Input:\n{given}\n" if given else ""
    return {"prompt": f"{prompt}\n### Response:\n", "completion": record["output"]}


_ALPACA = RecordFormat("Alpaca, with Alpaca's prompt", "prompt", _REQUIRED, _EXTRAS, _alpaca)
_ALPACA_CHAT = RecordFormat("Alpaca, as a conversation", "messages", _REQUIRED, _EXTRAS, _alpaca_chat)
_SHAREGPT = RecordFormat(
    "ShareGPT", "messages", ("conversations",), ("system", "tools"), partial(conversation, "conversations")
)


# From a record to tokens.


class TokenizedRecord(NamedTuple):
    """The whole record, before truncation: ids, and which of them the loss counts."""

    ids: list[int]
    trained: list[bool]


def tokenize_record(record: Record, tokenizer: Tokenizer, record_format: RecordFormat | None = None) -> TokenizedRecord:
    """Tokens of one record. The loss covers the completion, the assistant's turns or the whole text, and an end token.

    record_format: that of its file; by default the record's own.
    Raises ConfigurationError (without the place) for a record of another format, and for one that is malformed.
    """
    record_format = record_format or format_of(tuple(record), ColumnNames(), bool(tokenizer.chat_template))
    native = record_format.native(record)
    if record_format.kind == "messages":
        return _tokenize_messages(native, tokenizer)
    for name in NATIVE_FIELDS[record_format.kind]:
        _require_text(native[name], f'"{name}"')
    if record_format.kind == "text":
        ids = [*tokenizer.encode_prompt(native["text"]), tokenizer.eos_id]
        return TokenizedRecord(ids, [True] * len(ids))
    prompt_ids, completion_ids = encode_segments(tokenizer.encode, [native["prompt"], native["completion"]])
    before = prompt_ids if tokenizer.bos_id is None else [tokenizer.bos_id, *prompt_ids]
    after = [*completion_ids, tokenizer.eos_id]
    return TokenizedRecord(before + after, [False] * len(before) + [True] * len(after))


def _require_text(value: Any, name: str) -> None:
    require(isinstance(value, str), f"{name} is not text but {type(value).__name__}.")


def encode_segments(encode: Callable[[str], list[int]], texts: Sequence[str]) -> list[list[int]]:
    """Ids of each segment of one text; those before a boundary are the ids of the text before it, as in generation."""
    segments: list[list[int]] = []
    ids: list[int] = []
    joined = ""
    for text in texts:
        joined += text
        # The ids of the joined text, since a sentencepiece model would begin each segment with a space; but a segment
        # whose first token would straddle the boundary is tokenized by itself.
        whole = encode(joined) if text else ids
        segment = whole[len(ids) :] if whole[: len(ids)] == ids else encode(text)
        segments.append(segment)
        ids = ids + segment
    return segments


def _tokenize_messages(record: Record, tokenizer: Tokenizer) -> TokenizedRecord:
    """The template writes the special tokens itself, so none is put before, and one after only if it is missing."""
    inputs = template_inputs(tokenizer.chat_template)
    wanted = sorted(inputs.variables & record.keys() - {"messages", "tools"})
    require(
        not wanted,
        f"the chat template reads {', '.join(wanted)}, which the record has but the template does not get: write it "
        "into the messages, or rename the field.",
    )
    messages, tools = record["messages"], record.get("tools")
    _check_messages(messages, inputs.fields)
    segments = split_chat(partial(tokenizer.render_chat, tools=tools), messages)
    tokens = encode_segments(tokenizer.encode, [segment.text for segment in segments])
    last_turn = max(i for i, segment in enumerate(segments) if segment.trained)
    if tokenizer.eos_id not in tokens[last_turn]:
        tokens[last_turn] = [*tokens[last_turn], tokenizer.eos_id]
    trained: list[bool] = []
    for segment, ids in zip(segments, tokens, strict=True):
        # The loss covers a turn up to its end token, not what the template puts behind it (a line break).
        end = len(ids) - ids[::-1].index(tokenizer.eos_id) if tokenizer.eos_id in ids else len(ids)
        trained += [segment.trained and i < end for i in range(len(ids))]
    return TokenizedRecord([i for ids in tokens for i in ids], trained)


def _check_messages(messages: Sequence[Any], fields: frozenset[str]) -> None:
    """fields: those that the chat template reads. Raises ConfigurationError for what it would not write as it is."""
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict):
            raise ConfigurationError(f"message {number} is not an object but {type(message).__name__}.")
        require(
            message.get("role") != "assistant" or message.get("weight") in (None, 1),
            f"message {number} has the weight {message.get('weight')}, but the loss covers every assistant turn: drop "
            "the field, or leave the turn out.",
        )
        require(
            not message.get("function_call") or "function_call" in fields,
            f"message {number} has a function_call, which the chat template does not write: make it one of tool_calls.",
        )
        calls = message.get("tool_calls")
        require(
            not calls or "tool_calls" in fields,
            f"message {number} has tool_calls, which the tokenizer's chat template does not write: give "
            "--tokenizer-model a folder whose template does.",
        )
        for name in ("role",) if calls and message.get("content") is None else ("role", "content"):
            require(name in message, f'message {number} lacks the field "{name}".')
            _require_text(message[name], f'"{name}" of message {number}')


@dataclass(frozen=True)
class Fit:
    """How a record becomes a sample of at most `seq_length` input positions (--overlong)."""

    tokenizer: Tokenizer
    seq_length: int
    overlong: str = "truncate"
    columns: ColumnNames = ColumnNames()

    @classmethod
    def of(cls, config: DataConfig, tokenizer: Tokenizer) -> "Fit":
        return cls(tokenizer, config.seq_length, config.overlong, ColumnNames.of(config))

    def cut(self, ids: Sequence[int], trained: Sequence[bool]) -> Sample:
        """The sample of a whole record; of length 0 if it is to be skipped."""
        sample = sample_from_ids(ids, trained, self.seq_length)
        skips = self.overlong != "truncate" and any(trained[self.seq_length + 1 :])
        return sample_from_ids(ids, trained, 0) if skips else sample

    def tokenized(self, records: RecordFiles, index: int) -> TokenizedRecord:
        """The whole record. Raises ConfigurationError naming file and line."""
        record, record_format = records[index], self.format_of(records, index)
        try:
            return tokenize_record(record, self.tokenizer, record_format)
        except ConfigurationError as error:
            raise ConfigurationError(f"{records.place(index)}: {error}") from error

    def format_of(self, records: RecordFiles, index: int) -> RecordFormat:
        """The format of the file that holds a record: that of its first one. Raises ConfigurationError."""
        first, fields = records.first_of_file(index)
        try:
            return format_of(fields, self.columns, bool(self.tokenizer.chat_template))
        except ConfigurationError as error:
            raise ConfigurationError(f"{records.place(first)}: {error}") from error

    def left_out(self, records: RecordFiles, index: int) -> list[str]:
        """Fields of a record that nothing reads and, as `messages[].name`, those of its messages; `PARTIAL_ANSWER`."""
        record_format = self.format_of(records, index)
        native, kind = record_format.native(records[index]), record_format.kind
        if kind != "messages":
            return [name for name in native if name not in NATIVE_FIELDS[kind]]
        inputs = template_inputs(self.tokenizer.chat_template)
        read = {"messages"} | ({"tools"} & inputs.variables)
        of_messages = {"role", "content", "tool_calls"} | inputs.fields
        inner = {name: None for message in native["messages"] for name in message if message[name] is not None}
        unread = [f"messages[].{name}" for name in inner if name not in of_messages]
        text = _without_spaces(self.tokenizer.render_chat(native["messages"], tools=native.get("tools")))
        answers = (turn.get("content") or "" for turn in native["messages"] if turn["role"] == "assistant")
        is_partial = any(_without_spaces(answer) not in text for answer in answers)
        return [name for name in native if name not in read] + unread + [PARTIAL_ANSWER] * is_partial


PARTIAL_ANSWER = "part of messages[].content"  # where the template leaves out an assistant's reasoning, for instance


def _without_spaces(text: str) -> str:
    return "".join(text.split())
