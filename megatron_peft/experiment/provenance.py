"""Where the numbers of a cell come from: the experiment's file, its words on this cell, the commit and the data.

A record holds digests (sha256) of them, written by the runner when it starts the process that the numbers come out of.
The digest of the cell covers what concerns this cell alone, so the file may gain a method or a task and the record
still fits; a record that was moved from another experiment, or whose flags were rewritten, does not.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_peft.experiment.cells import Cell
from megatron_peft.experiment.record import CellRecord, source_version
from megatron_peft.experiment.spec import Score

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
    return digest(json.dumps(asdict(cell), sort_keys=True))


def score_digest(cell: Cell, score: Score) -> str:
    return digest(json.dumps([asdict(cell), asdict(score)], sort_keys=True))


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def data_files(words: Sequence[str]) -> Iterator[Path]:
    """Those that the data flags of a command name: files, the two behind an indexed prefix, or all of a folder."""
    flag = ""
    for word in words:
        if word.startswith("--"):
            flag = word
        elif flag in DATA_FLAGS:
            path = Path(word)
            found = sorted(path.iterdir()) if path.is_dir() else [path, Path(f"{word}.bin"), Path(f"{word}.idx")]
            yield from (one for one in found if one.is_file())


def misfits(cell: Cell, score: Score | None, record: CellRecord) -> Iterator[str]:
    """What of a record is not of the cell as the experiment's file has it now."""
    now: Mapping[str, Any] = asdict(cell)
    for name, value in now.items():
        if getattr(record, name) != value:
            yield f"its {name} {_difference(getattr(record, name), value)}"
    digests = {"training": training_digest(cell), "score": score_digest(cell, score) if score else ""}
    for name, expected in digests.items():
        source = record.provenance.get(name)
        if source and (wrote := str(source.get("cell_sha256"))) != expected:
            yield (
                f"its {name} came from other words of the experiment's file: the runner wrote the digest {wrote[:12]}, "
                f"these words have {expected[:12] or 'no score'}"
            )


def _difference(has: Any, expected: Any) -> str:
    if isinstance(has, tuple) and isinstance(expected, tuple) and set(has) ^ set(expected):
        ours, theirs = [word for word in has if word not in expected], [word for word in expected if word not in has]
        return f"hold {' '.join(ours) or 'nothing'} where the file has {' '.join(theirs) or 'nothing'}"
    return f"are {has!r}, the file's {expected!r}" if isinstance(has, tuple) else f"is {has!r}, the file's {expected!r}"
