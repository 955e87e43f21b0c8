"""The file of a finished cell: what ran, with what versions, and what came out. Small enough to be committed.

`CELLS/KEY.json` appears whole or not at all. A cell counts as trained only while its flags are those of the file, so
an experiment whose flags were changed runs again what they concern.
"""

import json
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from megatron_peft.config import ConfigurationError
from megatron_peft.config.untrusted import read_json_object
from megatron_peft.experiment.cells import Cell
from megatron_peft.training.metrics import finite

CELLS = "cells"
MOST_POINTS = 200  # of a curve in the file; longer ones are thinned
MOST_LAMBDAS = 20  # iterations of each layer
CURVES = ("loss", "grad_norm", "validation_loss")
TRAINABLE = re.compile(r"trainable parameters: ([\d,]+) of")  # of training.summary
PACKAGES = ("megatron-peft", "megatron-core", "torch", "transformers")


@dataclass(frozen=True)
class CellRecord:
    """What is known of a cell that ended.

    Attributes:
        status: "trained" or "failed".
        validation_loss: at the end of the run; None if it failed or measured none.
        curves: name -> [[iteration, epoch, value], ...].
        lambdas: the Hybrid's of each layer, {"iterations": [...], "by_layer": {layer: [...]}}; empty for other methods.
        epoch_seconds: time of one pass over the training data, from the mean time of a step.
        scores: name of the metric -> number; empty until it is scored.
        reason: of the failure, training's or scoring's last words.
        provenance: "training" and "score" -> what each came from (`provenance.py`); empty in older records.
    """

    model: str
    task: str
    method: str
    settings: Mapping[str, str]
    seed: int
    flags: tuple[str, ...]
    processes: int
    status: str
    started_at: str = ""
    seconds: float = 0.0
    validation_loss: float | None = None
    iterations: int = 0
    trainable_parameters: int | None = None
    step_seconds: float | None = None
    epoch_seconds: float | None = None
    peak_memory_bytes: int | None = None
    curves: Mapping[str, Sequence[Sequence[float]]] = field(default_factory=dict)
    lambdas: Mapping[str, Any] = field(default_factory=dict)
    scores: Mapping[str, float] = field(default_factory=dict)
    score_command: tuple[str, ...] = ()
    score_seconds: float = 0.0
    reason: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    provenance: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def is_trained(self) -> bool:
        return self.status == "trained"


def cell_file(folder: Path, cell: Cell) -> Path:
    return folder / CELLS / f"{cell.key}.json"


def write_record(folder: Path, cell: Cell, record: CellRecord) -> None:
    path = cell_file(folder, cell)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    lines = [
        f" {json.dumps(name)}: {json.dumps(value, ensure_ascii=False)}"
        for name, value in finite(asdict(record)).items()
        if value or name != "provenance"  # a copy of a record that says none is the same text
    ]
    temporary.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")  # a field a line, for diffs
    temporary.replace(path)


def read_record(folder: Path, cell: Cell) -> CellRecord | None:
    """The cell's file, or None: there is none, or it is of other flags than the cell has now."""
    path = cell_file(folder, cell)
    if not path.exists():
        return None
    record = read_file(path)
    return record if record.flags == cell.flags and record.processes == cell.processes else None


def read_file(path: Path) -> CellRecord:
    """Raises ConfigurationError for a file that is not a cell's."""
    try:
        values = read_json_object(path)
        tuples = {name: tuple(values[name]) for name in ("flags", "score_command")}
        for source in values.get("provenance", {}).values():
            if not isinstance(source["data_sha256"], Mapping) or "cell_sha256" not in source:
                raise TypeError("its provenance")
        return CellRecord(**{**values, **tuples})
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigurationError(f"{path} is not the file of a cell ({error!r}): remove it to run the cell.") from error


def of_cell(cell: Cell, status: str, **values: Any) -> CellRecord:
    """A record of `cell` as it is now, with this environment's versions."""
    return CellRecord(
        model=cell.model,
        task=cell.task,
        method=cell.method,
        settings=dict(cell.settings),
        seed=cell.seed,
        flags=cell.flags,
        processes=cell.processes,
        status=status,
        versions=versions(),
        **values,
    )


def from_metrics(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The fields of a `CellRecord` that the lines of metrics.jsonl tell."""
    last = records[-1]
    step_seconds = _mean([record["step_seconds"] for record in records if record.get("step_seconds")])
    epochs = last.get("epoch") or 0
    return {
        "iterations": last["iteration"],
        "validation_loss": last.get("validation_loss"),
        "step_seconds": step_seconds,
        "epoch_seconds": step_seconds * last["iteration"] / epochs if step_seconds and epochs else None,
        "peak_memory_bytes": max((record.get("peak_memory_bytes") or 0 for record in records), default=0) or None,
        "curves": {name: curve for name in CURVES if (curve := _curve(records, name))},
    }


def from_lambdas(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The field `lambdas` from the lines of lambda.jsonl, thinned: 120 layers a step would be most of the file."""
    kept = thinned(records, MOST_LAMBDAS)
    return {
        "iterations": [record["iteration"] for record in kept],
        "by_layer": {layer: [round(record["lambda"][layer], 3) for record in kept] for layer in kept[-1]["lambda"]},
    }


def thinned(points: Sequence[Any], most: int) -> list[Any]:
    """Points at even distances, about `most` of them; the last is always there."""
    step = -(-len(points) // most) or 1
    return [point for at, point in enumerate(points) if at % step == 0 or at == len(points) - 1]


def trainable_parameters(log: str) -> int | None:
    """What a run says about itself at its start."""
    found = TRAINABLE.search(log)
    return int(found.group(1).replace(",", "")) if found else None


def versions() -> dict[str, str]:
    """Of Python and of what the numbers depend on; a package that is not installed is left out."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found | source_version()


def source_version() -> dict[str, str]:
    """The commit of the source that runs, and whether it was changed since; nothing outside a git checkout."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        changes = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no", ":/"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return {}
    return {"commit": commit.stdout.strip() + (" with changes" if changes.stdout.strip() else "")}


def _curve(records: Sequence[Mapping[str, Any]], name: str) -> list[list[float]]:
    points = [
        [record["iteration"], round(record.get("epoch") or 0.0, 6), round(record[name], 6)]
        for record in records
        if record.get(name) is not None
    ]
    return thinned(points, MOST_POINTS)


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
