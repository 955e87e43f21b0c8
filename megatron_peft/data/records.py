"""Records as token ids and a mask of what the loss counts. docs/data.md has the formats. Imports no torch: the preview
reads records with it in seconds."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from megatron_peft.config import ConfigurationError, DataConfig, require
from megatron_peft.data.files import RecordFiles
from megatron_peft.data.formats import NATIVE_FIELDS, ColumnNames, Record, RecordFormat, format_of
from megatron_peft.data.samples import Sample, sample_from_ids
from megatron_peft.data.tokenizers import Tokenizer, split_chat, template_inputs

MAX_WORK = 1 << 25  # of a conversation: messages times characters, of which half are tokenized, a million a second


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
    characters = sum(len(text) for message in messages for text in message.values() if isinstance(text, str))
    require(
        len(messages) * characters <= MAX_WORK,
        f"a conversation of {len(messages):,} messages with {characters:,} characters, and each message is written and "
        f"tokenized with all before it: their product is limited to {MAX_WORK:,}. Split the conversation.",
    )
    require(
        tools is None or (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)),
        '"tools" is not a list of objects, each the JSON schema of a function.',
    )
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


def _check_messages(messages: Any, fields: frozenset[str]) -> None:
    """fields: those that the chat template reads. Raises ConfigurationError for what it would not write as it is."""
    if not isinstance(messages, list) or not messages:
        raise ConfigurationError('"messages" is not a list of objects with "role" and "content", or it is empty.')
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
        """Fields of a record that nothing reads and, as `messages[].name`, those of its messages."""
        record_format = self.format_of(records, index)
        native, kind = record_format.native(records[index]), record_format.kind
        if kind != "messages":
            return [name for name in native if name not in NATIVE_FIELDS[kind]]
        inputs = template_inputs(self.tokenizer.chat_template)
        read = {"messages"} | ({"tools"} & inputs.variables)
        of_messages = {"role", "content", "tool_calls"} | inputs.fields
        inner = {name: None for message in native["messages"] for name in message if message[name] is not None}
        unread = [f"messages[].{name}" for name in inner if name not in of_messages]
        return [name for name in native if name not in read] + unread
