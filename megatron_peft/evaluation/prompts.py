"""Prompts from a command line or a file, as records and as token ids."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_peft.config import ConfigurationError, require
from megatron_peft.config.untrusted import parse_json, read_text, require_regular
from megatron_peft.data.tokenizers import Tokenizer

Record = Mapping[str, Any]
JSON_SUFFIXES = (".json", ".jsonl")


def read_prompts(path: Path) -> list[Record]:
    """`{"prompt": ...}` of each line of a text; of JSON lines the objects, which hold prompt or messages.

    Raises:
        ConfigurationError: the file cannot be read, or holds no prompt; a line that is none, by its number.
    """
    require_regular(path, "--prompt-file")
    lines = read_text(path).splitlines()
    is_json = path.suffix in JSON_SUFFIXES
    found = [_record(line, f"{path}:{number}", is_json) for number, line in enumerate(lines, 1) if line.strip()]
    require(bool(found), f"--prompt-file {path} holds no prompt.")
    return found


def _record(line: str, place: str, is_json: bool) -> Record:
    if not is_json:
        return {"prompt": line}
    record = parse_json(line, place)
    is_prompt = isinstance(record, dict) and (isinstance(record.get("prompt"), str) or _are_messages(record))
    require(is_prompt, f'{place}: neither {{"prompt": "..."}} nor {{"messages": [...]}}.')
    return record


def _are_messages(record: Record) -> bool:
    messages = record.get("messages")
    return isinstance(messages, list) and bool(messages) and all(isinstance(one, dict) for one in messages)


def encode_prompts(records: Sequence[Record], tokenizer: Tokenizer, chat: bool, max_length: int) -> list[list[int]]:
    """Token ids of each record.

    Args:
        chat: a prompt is what a user says.
        max_length: positions of the model; a prompt and at least one new token must fit.

    Raises:
        ConfigurationError: a prompt that is too long or empty, by its number; messages without a chat template.
    """
    return list(_encoded(records, tokenizer, chat, max_length))


def _encoded(records: Sequence[Record], tokenizer: Tokenizer, chat: bool, max_length: int) -> Iterator[list[int]]:
    for number, record in enumerate(records, 1):
        try:
            ids = _ids(record, tokenizer, chat) or [tokenizer.prefix_id]
        except ConfigurationError as error:
            raise ConfigurationError(f"prompt {number}: {error}") from error
        require(
            len(ids) < max_length,
            f"prompt {number} has {len(ids)} tokens, but the model has {max_length} positions for prompt and answer "
            "together: shorten it.",
        )
        yield ids


def _ids(record: Record, tokenizer: Tokenizer, chat: bool) -> list[int]:
    messages = record.get("messages")
    if messages is None and chat:
        messages = [{"role": "user", "content": record["prompt"]}]
    if messages is None:
        return tokenizer.encode_prompt(record["prompt"])
    return tokenizer.encode(tokenizer.render_chat(messages, add_generation_prompt=True, tools=record.get("tools")))
