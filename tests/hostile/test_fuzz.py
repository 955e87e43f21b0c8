"""Files damaged at random: whatever they hold, a program ends with 0, or with 2 and the file's name; soon, and small.

A family is a kind of file and the program that reads it. `MEGATRON_PEFT_FUZZ_TRIES=50` tries each family more often.
"""

import json
import os
import random
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from tests.hostile import test_hostile_files as at
from tests.hostile.programs import CHECKPOINT, Answer, Call, answers, sign
from tests.ranks import run_ranks
from tests.time_limits import seconds

TRIES = 1 + int(os.environ.get("MEGATRON_PEFT_FUZZ_TRIES", "4"))  # and the good file itself
MOST_SECONDS, MOST_BYTES = 30.0, 2 << 30
CACHED = f"{at.TRAIN} --data-cache-path kept"
TABLE = at.TRAIN.replace("data.jsonl", "table.{}")
OTHER_OUTPUT = at.EVALUATE.replace("out.json", "other.json")
# Beside the good runs of every hostile test.
MORE_GOOD_RUNS = (CACHED, at.EVALUATE, f"{at.TRAIN} --save watched --log-interval 1")
Damage = Callable[[bytes, random.Random], bytes]


class Family(NamedTuple):
    """`file` is read by the program of `line`, in one of the forms of `damages`.

    told: a regular expression that an error must hold; without one, the file's name. signed: its folder has checksums.
    """

    file: str
    line: str
    damages: tuple[Damage, ...]
    told: str = ""
    signed: bool = False

    def __str__(self) -> str:
        return f"{self.line.split()[0].rpartition('.')[2]}-{self.file}"


# Values that no reader expects. Written as JSON, in which they are numbers out of range too.
STRANGE = (
    *("null", "true", "[]", "{}", '""', '"x"', "-1", "0", "1.5", "1e999", "NaN", "[[[]]]", "[null]", '{"a": {"a": 1}}'),
    *("9" * 30, "9" * 5000, "1000000000000", "-1000000000000", "2147483648", "[" * 200 + "]" * 200, f'"{"x" * 300}"'),
    *('"\\u001b[31mred"', '"../../etc/passwd"', '"/dev/zero"', '"\\ud800"', '"%s%n"'),
)


def bits(content: bytes, draw: random.Random) -> bytes:
    """One to eight bits are the other way round."""
    damaged = bytearray(content)
    for _ in range(draw.randint(1, 8)):
        damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
    return bytes(damaged)


def head(content: bytes, draw: random.Random) -> bytes:
    """As `bits`, within the first hundred bytes, where sizes are."""
    return bits(content[:100], draw) + content[100:]


def cut(content: bytes, draw: random.Random) -> bytes:
    """The end is missing."""
    return content[: draw.randrange(len(content))]


def hole(content: bytes, draw: random.Random) -> bytes:
    """A piece is missing, is zeros, or stands there a hundred times."""
    start, stop = sorted(draw.randrange(len(content) + 1) for _ in range(2))
    piece = content[start:stop]
    return content[:start] + draw.choice((b"", bytes(len(piece)), piece * 100)) + content[stop:]


def values(content: bytes, draw: random.Random) -> bytes:
    """A value of JSON or YAML is another one, is missing, or has another name."""
    return _damaged_value(yaml.safe_load(content), draw).encode()


def line(content: bytes, draw: random.Random) -> bytes:
    """As `values`, in a line of JSON lines."""
    lines = content.decode().splitlines()
    at = draw.randrange(len(lines))
    lines[at] = _damaged_value(json.loads(lines[at]), draw)
    return "\n".join(lines).encode() + b"\n"


def header(content: bytes, draw: random.Random) -> bytes:
    """As `values`, in the header of a safetensors file."""
    size = int.from_bytes(content[:8], "little")
    damaged = _damaged_value(json.loads(content[8 : 8 + size]), draw).encode()
    return len(damaged).to_bytes(8, "little") + damaged + content[8 + size :]


def _damaged_value(value: Any, draw: random.Random) -> str:
    holders = [one for one in _holders(value) if one]
    if not holders:
        return draw.choice(STRANGE)
    holder = draw.choice(holders)
    key = draw.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
    match draw.randrange(6):
        case 0:
            del holder[key]
        case 1:
            holder[key] = [holder[key]]
        case 2 if isinstance(holder, dict):
            holder[f"{key}\x1b[1m"] = holder.pop(key)
        case _:
            holder[key] = "<strange>"
            return json.dumps(value, default=str).replace('"<strange>"', draw.choice(STRANGE))
    return json.dumps(value, default=str)


def _holders(value: Any) -> list[Any]:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    found = [value] if isinstance(value, dict | list) else []
    return found + [holder for one in inner for holder in _holders(one)]


BYTES = (bits, cut, hole)
NUMBERS = (head, bits, cut, hole)
OBJECT = (values, values, values, *BYTES)
LINES = (line, line, line, *BYTES)
FAMILIES = (
    Family("base/config.json", at.TRAIN, OBJECT),
    Family("base/generation_config.json", at.GENERATE, OBJECT),
    Family("base/tokenizer.json", at.TRAIN, OBJECT),
    Family("base/tokenizer_config.json", at.TRAIN, OBJECT),
    Family("base/chat_template.jinja", at.CHAT, BYTES, "chat template|holds no tokenizer|no token to learn from"),
    Family("base/model.safetensors", at.CONVERT, (header, header, *NUMBERS)),
    Family("sharded/model.safetensors.index.json", at.SHARDED, OBJECT),
    Family("bin/pytorch_model.bin", at.FROM_BIN, NUMBERS),
    Family("data.jsonl", at.TRAIN, LINES),
    Family("chat.jsonl", at.CHAT, LINES),
    Family("table.csv", TABLE.format("csv"), BYTES),
    Family("table.parquet", TABLE.format("parquet"), NUMBERS),
    Family("table.arrow", TABLE.format("arrow"), NUMBERS),
    Family("prompts.jsonl", at.GENERATE, LINES),
    Family("texts.jsonl", at.PREPROCESS, LINES),
    Family("tokens_text_document.idx", at.INDEXED, NUMBERS),
    Family("tokens_text_document.bin", at.INDEXED, NUMBERS, "tokens_text_document"),
    Family("kept/generator/**/*.arrow", CACHED, (cut,), "kept are damaged"),
    Family("peft/adapter_config.json", at.IMPORT, OBJECT, "peft"),
    Family("peft/adapter_model.safetensors", at.IMPORT, (header, header, *NUMBERS), "peft"),
    Family(f"{CHECKPOINT}/run_record.json", at.RESUME, OBJECT, signed=True),
    Family(f"{CHECKPOINT}/run_record.json", at.MERGE, OBJECT, signed=True),
    Family(f"{CHECKPOINT}/manifest.json", at.RESUME, OBJECT),
    Family(f"{CHECKPOINT}/.metadata", at.FROM_RUN, NUMBERS, CHECKPOINT),
    Family(f"{CHECKPOINT}/*.distcp", at.RESUME, NUMBERS, CHECKPOINT, signed=True),
    Family("run/latest_checkpointed_iteration.txt", at.RESUME, BYTES),
    Family("run/adapter_config.json", at.MERGE, OBJECT),
    Family("tasks/tiny_choices.yaml", OTHER_OUTPUT, OBJECT, "tiny_choices"),
    Family("tasks/questions.jsonl", OTHER_OUTPUT, LINES, "questions|tiny_choices"),
    Family("out.requests.jsonl", at.EVALUATE, LINES),
    Family("gsm8k/train.jsonl", at.GSM8K, LINES),
    Family("pairs.tsv", at.PAIRS, BYTES),
    Family("problems.jsonl.gz", at.HUMANEVAL, NUMBERS),
    Family("grid.yaml", at.EXPERIMENT, OBJECT),
    Family("cells/tiny,talk,lora,lr=0.4,seed=1.json", "tools.report .", OBJECT),
    Family("watched/metrics.jsonl", "tools.report watched", LINES),
    # A file that ends after a section is a smaller one, which lacks data.
    Family("watched/run.yaml", "pretrain_peft --config watched/run.yaml --save other", OBJECT, r"run.yaml|no training"),
)


def damaged(path: Path, number: int, attempt: int) -> None:
    """Damage a file as the family's attempt of that number does, always in the same way; the first leaves it alone."""
    family, draw = FAMILIES[number], random.Random(f"{FAMILIES[number]} {attempt}")
    if attempt == 0:
        return
    path.write_bytes(family.damages[attempt % len(family.damages)](path.read_bytes(), draw))
    if family.signed:
        sign(path.parent)


@pytest.fixture(scope="module")
def answered(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[Answer]]:
    """Of each family that was asked for."""
    asked = [item.callspec.params["number"] for item in request.session.items if item.path == request.path]
    calls = [
        Call(FAMILIES[number].line, FAMILIES[number].file, partial(damaged, number=number, attempt=attempt))
        for number in asked
        for attempt in range(TRIES)
    ]
    run = partial(answers, more=MORE_GOOD_RUNS)
    (told,) = run_ranks(1, run, (tmp_path_factory.mktemp("fuzz"), calls), limit=40 * len(calls) + 100)
    return {number: told[place * TRIES : (place + 1) * TRIES] for place, number in enumerate(asked)}


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(FAMILIES)), ids=[str(family) for family in FAMILIES])
def test_a_damaged_file_is_read_or_named(number: int, answered: dict[int, list[Answer]]) -> None:
    family = FAMILIES[number]
    name = family.told or re.escape(Path(family.file).name).replace(r"\*", ".*")
    faults = []
    for attempt, answer in enumerate(answered[number]):
        if answer.code not in ((0, 2) if attempt else (0,)) or "Traceback" in answer.told:
            faults.append(f"{attempt}: ended with {answer.code}: {answer.told[-600:]}")
        elif answer.code == 2 and not re.search(name, answer.told):
            faults.append(f"{attempt}: does not name the file: {answer.told[-600:]}")
        elif answer.seconds > seconds(MOST_SECONDS) or answer.peak_bytes > MOST_BYTES:
            faults.append(f"{attempt}: took {answer.seconds:.0f} s and {answer.peak_bytes >> 20} MiB")
    assert not faults, "\n\n".join(faults)
