"""Instruction data: records as token ids and a mask of what the loss counts, surveyed once, read as samples."""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch.distributed as dist
from jinja2 import TemplateError, meta, nodes
from jinja2.sandbox import SandboxedEnvironment
from rich.progress import track

from megatron_peft.config import ConfigurationError, require
from megatron_peft.data.batches import Sample, sample_from_ids
from megatron_peft.data.jsonl import JsonRecords, Record
from megatron_peft.data.tokenizers import ChatSegment, Tokenizer
from megatron_peft.runtime.launch import gather_over_world

# Records as token ids; docs/data.md has the three kinds of record, and what becomes of other fields.


class TokenizedRecord(NamedTuple):
    """The whole record, before truncation: ids, and which of them the loss counts."""

    ids: list[int]
    trained: list[bool]


def tokenize_record(record: Record, tokenizer: Tokenizer) -> TokenizedRecord:
    """Tokens of one record. The loss covers the completion, the assistant's turns or the whole text, and an end token.

    Raises ConfigurationError (without the place) for a record of another kind, and for one that is malformed.
    """
    kind = next((kind for kind in _KINDS if kind in record), None)
    require(
        kind is not None,
        f'the record has the fields {", ".join(record) or "(none)"}, but neither "prompt" and "completion", nor '
        '"messages", nor "text".',
    )
    return _KINDS[str(kind)](record, tokenizer)


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


def _tokenize_completion(record: Record, tokenizer: Tokenizer) -> TokenizedRecord:
    prompt, completion = _text(record, "prompt"), _text(record, "completion")
    prompt_ids, completion_ids = encode_segments(tokenizer.encode, [prompt, completion])
    before = _bos(tokenizer) + prompt_ids
    after = [*completion_ids, tokenizer.eos_id]
    return TokenizedRecord(before + after, [False] * len(before) + [True] * len(after))


def _tokenize_text(record: Record, tokenizer: Tokenizer) -> TokenizedRecord:
    ids = [*_bos(tokenizer), *tokenizer.encode(_text(record, "text")), tokenizer.eos_id]
    return TokenizedRecord(ids, [True] * len(ids))


def _tokenize_messages(record: Record, tokenizer: Tokenizer) -> TokenizedRecord:
    """The template writes the special tokens itself, so none is put before, and one after only if it is missing."""
    wanted = sorted(template_inputs(tokenizer.chat_template).variables & record.keys() - {"messages", "tools"})
    require(
        not wanted,
        f"the chat template reads {', '.join(wanted)}, which the record has but the template does not get: write it "
        "into the messages, or rename the field.",
    )
    segments = tokenizer.split_chat(_messages(record, tokenizer), _tools(record))
    tokens = encode_segments(tokenizer.encode, [segment.text for segment in segments])
    last_turn = max(i for i, segment in enumerate(segments) if segment.trained)
    if tokenizer.eos_id not in tokens[last_turn]:
        tokens[last_turn] = [*tokens[last_turn], tokenizer.eos_id]
    trained = [flag for one, ids in zip(segments, tokens, strict=True) for flag in _turn_mask(one, ids, tokenizer)]
    return TokenizedRecord([i for ids in tokens for i in ids], trained)


def _turn_mask(segment: ChatSegment, ids: list[int], tokenizer: Tokenizer) -> list[bool]:
    """The loss covers a turn up to its end token, not what the template puts behind it (a line break)."""
    if not segment.trained:
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
    fields = template_inputs(tokenizer.chat_template).fields
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
        if calls:
            require(
                "tool_calls" in fields,
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


class TemplateInputs(NamedTuple):
    """What a chat template reads."""

    variables: frozenset[str]  # messages, tools, ...
    fields: frozenset[str]  # possibly, of a message: attributes and strings of its code, not of its comments


@lru_cache
def template_inputs(template: str) -> TemplateInputs:
    """Raises ConfigurationError for a template that is not valid."""
    try:
        plain = re.sub(r"{%-?\s*(end)?generation\s*-?%}", "", template)  # a tag of transformers' own
        tree = _TEMPLATES.parse(plain)
        texts = {one.value for one in tree.find_all(nodes.Const) if isinstance(one.value, str)}
        fields = texts | {one.attr for one in tree.find_all(nodes.Getattr)}
        return TemplateInputs(frozenset(meta.find_undeclared_variables(tree)), frozenset(fields))
    except (TemplateError, RecursionError) as error:
        raise ConfigurationError(f"the chat template cannot be read: {error}.") from error


def fields_left_out(record: Record, tokenizer: Tokenizer) -> list[str]:
    """Unused fields of a record and, as `messages[].name`, of its messages."""
    kind = next(kind for kind in _KINDS if kind in record)
    if kind != "messages":
        return [name for name in record if name not in _FIELDS[kind]]
    inputs = template_inputs(tokenizer.chat_template)
    read = {"messages"} | ({"tools"} & inputs.variables)
    of_messages = {"role", "content", "tool_calls"} | inputs.fields
    inner = {name: None for message in record["messages"] for name in message if message[name] is not None}
    return [name for name in record if name not in read] + [
        f"messages[].{name}" for name in inner if name not in of_messages
    ]


_TEMPLATES = SandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"])
_FIELDS = {"prompt": {"prompt", "completion"}, "completion": {"prompt", "completion"}, "text": {"text"}}
_KINDS: dict[str, Callable[[Record, Tokenizer], TokenizedRecord]] = {
    "messages": _tokenize_messages,
    "prompt": _tokenize_completion,
    "completion": _tokenize_completion,
    "text": _tokenize_text,
}


# One pass over the data before training checks every record and measures its length, so a bad record ends the run at
# its start. Each rank surveys an equal share of the records. What is kept: 5 bytes a record.

_PROGRESS_FROM = 20_000  # records; fewer take a moment only


@dataclass(frozen=True)
class Fit:
    """How a record becomes a sample of at most `seq_length` input positions (--overlong)."""

    tokenizer: Tokenizer
    seq_length: int
    overlong: str = "truncate"

    def sample(self, records: JsonRecords, index: int) -> tuple[Sample, int]:
        """The sample (of length 0 if it is to be skipped) and the input positions that the whole record would take.

        Raises ConfigurationError naming file and line.
        """
        record = records[index]
        try:
            ids, trained = tokenize_record(record, self.tokenizer)
            whole = sample_from_ids(ids, trained, len(ids))
            if self.overlong == "error":
                self._require_fits(whole)
        except ConfigurationError as error:
            raise ConfigurationError(f"{records.place(index)}: {error}") from error
        if len(whole) <= self.seq_length:
            return whole, len(whole)
        limit = self.seq_length if self.overlong == "truncate" else 0
        return sample_from_ids(ids, trained, limit), len(whole)

    def _require_fits(self, whole: Sample) -> None:
        require(
            len(whole) <= self.seq_length,
            f"the sample takes {len(whole)} tokens, above --seq-length {self.seq_length}: raise it, or give "
            "--overlong truncate or --overlong skip.",
        )
        require(len(whole) > 0, "the sample has no token to learn from: give it a text, or give --overlong skip.")


@dataclass(frozen=True)
class Survey:
    """What one pass over the data found.

    positions: int32 [records], the input positions of each sample, 0 where it is skipped; overlong: bool [records], the
    record alone is longer than --seq-length; left_out: number of records by unused field.
    """

    positions: np.ndarray
    overlong: np.ndarray
    left_out: Counter[str]

    @property
    def usable(self) -> np.ndarray:
        """int64 [samples]: the record of each sample."""
        return np.flatnonzero(self.positions)

    def summary(self, records: JsonRecords, fit: Fit) -> list[str]:
        """A sentence for each thing that the user should know, with the first place where it happens."""
        skipped = self.positions == 0
        too_long = f"are longer than --seq-length {fit.seq_length} and were"
        prompt_only = ", since their prompt alone fills it and no token of a completion is left"
        findings = (
            (self.overlong & ~skipped, f"{too_long} cut at their end"),
            (self.overlong & skipped, f"{too_long} skipped{prompt_only if fit.overlong == 'truncate' else ''}"),
            (~self.overlong & skipped, "have no token to learn from and were skipped"),
        )
        fields = ", ".join(f'"{name}" ({count} records)' for name, count in self.left_out.most_common())
        unread = [f"fields that nothing reads were left out: {fields}."] if fields else []
        return unread + [
            f"{int(which.sum())} of {len(which)} samples {what} (first: {records.place(int(which.argmax()))})."
            for which, what in findings
            if which.any()
        ]


def survey(records: JsonRecords, fit: Fit) -> Survey:
    """Read every record once. A collective over all ranks; all get the same result.

    Raises ConfigurationError, on every rank, for the first bad record, and if all samples were skipped.
    """
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    bounds = np.linspace(0, len(records), world_size + 1).astype(np.int64)
    shares = gather_over_world(_survey_share(records, fit, range(bounds[rank], bounds[rank + 1])))
    for share in shares:
        if isinstance(share, str):
            raise ConfigurationError(share)
    positions, overlong, left_out = zip(*shares, strict=True)
    found = Survey(np.concatenate(positions), np.concatenate(overlong), sum(left_out, Counter()))
    if not found.positions.any():
        why = " ".join(found.summary(records, fit))
        raise ConfigurationError(f"all {len(records)} samples were skipped (from {records.place(0)} on). {why}")
    return found


def _survey_share(records: JsonRecords, fit: Fit, share: range) -> tuple[np.ndarray, np.ndarray, Counter[str]] | str:
    """What `survey` gathers of some records. A bad record is returned as its message: raising would hang the others."""
    positions = np.zeros(len(share), dtype=np.int32)
    overlong = np.zeros(len(share), dtype=bool)
    left_out: Counter[str] = Counter()
    quiet = share.start > 0 or len(share) < _PROGRESS_FROM
    try:
        for i, index in enumerate(track(share, "reading samples", disable=quiet, transient=True)):
            sample, whole = fit.sample(records, index)
            positions[i], overlong[i] = len(sample), whole > fit.seq_length
            left_out.update(fields_left_out(records[index], fit.tokenizer))
    except ConfigurationError as error:
        return str(error)
    return positions, overlong, left_out


class InstructionDataset:
    """The samples of JSON records that are left after `--overlong`.

    lengths: int32 [samples], input positions of each; warnings: what was truncated or skipped.
    Building it is a collective over all ranks (see `survey`).
    """

    def __init__(self, records: JsonRecords, fit: Fit) -> None:
        self._records = records
        self.digest = records.digest
        self._fit = fit
        found = survey(records, fit)
        self._usable = found.usable
        self.lengths: np.ndarray = found.positions[self._usable]
        self.warnings = found.summary(records, fit)

    def __len__(self) -> int:
        return len(self._usable)

    def __getitem__(self, index: int) -> Sample:
        sample, _ = self._fit.sample(self._records, int(self._usable[index]))
        return sample

    def record(self, index: int) -> dict:
        """The JSON record of a sample."""
        return self._records[int(self._usable[index])]
