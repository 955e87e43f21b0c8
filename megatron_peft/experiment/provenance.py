"""Where the numbers of a cell come from: the experiment's file, its words on this cell, the commit and the data.

A record holds digests (sha256) of them, written by the runner when it starts the process that the numbers come out of.
The digest of the cell covers what concerns this cell alone, so the file may gain a method or a task and the record
still fits; a record that was moved from another experiment, or whose flags were rewritten, does not.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_peft.experiment.cells import Cell
from megatron_peft.experiment.record import CellRecord, source_version
from megatron_peft.experiment.spec import Score

# What the file says of a cell. A field of `Cell` beside them would not change the digests that records hold.
WORDS = ("model", "task", "method", "settings", "seed", "flags", "processes")
DATA_FLAGS = ("--train-data-path", "--valid-data-path", "--test-data-path", "--data-path", "--include-path")


def of_training(experiment: str, cell: Cell) -> dict[str, Any]:
    """What a training run comes from. Args: experiment: the text of the experiment's file."""
    return _source(experiment, training_digest(cell), cell.flags)


def of_score(experiment: str, cell: Cell, score: Score) -> dict[str, Any]:
    """What a score comes from; the commit too, since a cell may be scored later than it was trained."""
    return {**_source(experiment, score_digest(cell, score), score.command), **source_version()}


def _source(experiment: str, cell: str, words: Sequence[str]) -> dict[str, Any]:
    data = {str(path): file_digest(path) for path in data_files(words)}
    return {"experiment_sha256": digest(experiment), "cell_sha256": cell, "data_sha256": data}


def training_digest(cell: Cell) -> str:
    return digest(json.dumps(_words_on(cell), sort_keys=True))


def score_digest(cell: Cell, score: Score) -> str:
    return digest(json.dumps([_words_on(cell), asdict(score)], sort_keys=True))


def _words_on(cell: Cell) -> dict[str, Any]:
    return {name: getattr(cell, name) for name in WORDS}


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def data_files(words: Sequence[str]) -> Iterator[Path]:
    """Those that the data flags of a command name: files, the two behind an indexed prefix, or all of a folder."""
    for flag, values in by_flag(words).items():
        for word in values if flag in DATA_FLAGS else ():
            path = Path(word)
            found = sorted(path.iterdir()) if path.is_dir() else [path, Path(f"{word}.bin"), Path(f"{word}.idx")]
            yield from (one for one in found if one.is_file())


def by_flag(words: Sequence[str]) -> dict[str, list[str]]:
    """`--lr 0.1 --bf16` -> {"--lr": ["0.1"], "--bf16": []}; words before the first flag are left out."""
    found: dict[str, list[str]] = {}
    values: list[str] = []
    for word in words:
        if word.startswith("--"):
            values = found.setdefault(word, [])
        else:
            values.append(word)
    return found


def is_told(record: CellRecord) -> bool:
    """Whether the record says where all of its numbers came from."""
    return record.provenance.keys() >= ({"training", "score"} if record.scores else {"training"})


def misfits(cell: Cell, score: Score | None, record: CellRecord) -> list[str]:
    """What of a record is not of the cell as the experiment's file has it now."""
    named = [
        f"{name} is {getattr(record, name)!r} and {value!r} in the file"
        for name, value in _words_on(cell).items()
        if name != "flags" and getattr(record, name) != value
    ]
    ran, asked = by_flag(record.flags), by_flag(cell.flags)
    named += [
        f"{flag} is {_values(ran, flag)} and {_values(asked, flag)} in the file"
        for flag in sorted(ran.keys() | asked.keys())
        if ran.get(flag) != asked.get(flag)
    ]
    if named or record.flags != cell.flags:
        return named or ["its flags stand in another order than the file's"]
    digests = {"training": training_digest(cell), "score": score_digest(cell, score) if score else "none"}
    wrote = {name: str(source["cell_sha256"]) for name, source in record.provenance.items()}
    return [
        f"its {name} came from other words than the file: {has[:12]}, and {digests.get(name, 'none')[:12]} in the file"
        for name, has in wrote.items()
        if has != digests.get(name)
    ]


def _values(flags: Mapping[str, Sequence[str]], flag: str) -> str:
    return " ".join(flags[flag]) or "given" if flag in flags else "absent"
