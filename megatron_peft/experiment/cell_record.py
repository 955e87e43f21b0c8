"""The record of a finished cell: what ran, with which versions, and the results. Small enough to be committed.

`CELLS/KEY.json` contains a digest of itself, so an edited one is refused. A cell counts as trained only while its flags
are those of the experiment's file: cells whose flags were changed run again.
"""

import hashlib
import json
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import fmean
from typing import Any

from megatron_peft.checkpoint.folders import write_atomically
from megatron_peft.config import ConfigurationError
from megatron_peft.config.untrusted import read_json_object
from megatron_peft.experiment.cells import Cell
from megatron_peft.experiment.spec import AREA, TEST_LOSS, VALIDATION_LOSS, ScoreSpec
from megatron_peft.training.metrics import finite

CELLS = "cells"
MOST_POINTS = 200  # of a curve in the file; longer ones are thinned
MOST_OF_LAYERS = 20  # iterations of each layer
OWN_DIGEST = "sha256"  # of the record's other fields; records of older versions have none
CURVES = ("loss", "grad_norm", "validation_loss")
TRAINABLE = re.compile(r"trainable parameters: ([\d,]+) of")  # of training.terminal
TESTED = re.compile(r"test loss at iteration \d+: ([\d.E+-]+)")  # of training.loop
STOPPED = re.compile(r"(asked to stop|--exit-interval reached) at iteration \d+")  # of training.loop, with exit code 0
NOT_FINITE = "is NaN or infinite"  # of training.step
PACKAGES = ("megatron-peft", "megatron-core", "torch", "transformers")
# The fields of a `Cell` that its digest covers; others may be added without changing the digests of records.
DECLARED = ("model", "task", "method", "settings", "seed", "flags", "processes")


@dataclass(frozen=True)
class CellRecord(Cell):
    """The record of a cell that ended: the cell as it was, and what came of it.

    status: "trained", "failed", or "diverged": tried with a rate that was too high; reason: the end of a failure's log.
    validation_loss: at the end of the run; None if it failed or measured none. test_loss: the same of --test-data-path.
    curves: name -> [[iteration, epoch, value], ...].
    lambdas: the Hybrid's of each layer, {"iterations": [...], "by_layer": {layer: [...]}}; empty for other methods.
    grad_norms: of each transformer layer, in the same form; empty without --log-grad-norm-by-layer.
    seconds, cpu_seconds: of the training's processes, with their start and their validations; None if it was resumed.
    epoch_seconds: time of one pass over the training data, from the mean time of a step.
    scores: name of the metric -> number; empty until it is scored.
    items: name of the metric -> [[sum, count], ...] of each test item, where they are known: the sum of the losses of a
        sample's tokens and their number, or a score and 1. The metric is the sum of the sums over that of the counts.
    provenance: "training" and "score" -> the source of each; empty in older records.
    """

    status: str = "failed"
    started_at: str = ""
    seconds: float | None = 0.0
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
    test_loss: float | None = None
    items: Mapping[str, Sequence[Sequence[float]]] = field(default_factory=dict)
    cpu_seconds: float | None = None
    grad_norms: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_trained(self) -> bool:
        return self.status in ("trained", "diverged")

    def value(self, metric: str) -> float | None:
        """A score, or what every run has: its last losses, and the mean of all of its validation losses."""
        losses = [loss for _, _, loss in self.curves.get("validation_loss", ())]
        of_run = {VALIDATION_LOSS: self.validation_loss, TEST_LOSS: self.test_loss}
        return {**of_run, AREA: fmean(losses) if losses else None, **self.scores}.get(metric)

    @property
    def has_provenance(self) -> bool:
        """Whether the record has the source of all of its numbers."""
        return self.provenance.keys() >= ({"training", "score"} if self.scores else {"training"})

    def has_scores(self, score: ScoreSpec) -> bool:
        """Whether the record holds every number of this score."""
        return self.is_trained and score.metrics.keys() <= self.scores.keys()


def cell_file(folder: Path, cell: Cell) -> Path:
    """The JSON file of the cell's record."""
    return folder / CELLS / f"{cell.key}.json"


def write_record(folder: Path, cell: Cell, record: CellRecord) -> None:
    """Write the cell's record, whole or not at all."""
    path = cell_file(folder, cell)
    path.parent.mkdir(parents=True, exist_ok=True)
    values = finite(asdict(record))
    for name in ("provenance", "test_loss", "items", "cpu_seconds", "grad_norms"):  # which older records lack
        if not values[name]:
            del values[name]
    values |= {OWN_DIGEST: json_digest(values)}
    lines = [f" {json.dumps(name)}: {json.dumps(value, ensure_ascii=False)}" for name, value in values.items()]
    write_atomically(path, "{\n" + ",\n".join(lines) + "\n}\n")  # a field a line, for diffs


def read_cell_record(folder: Path, cell: Cell) -> CellRecord | None:
    """The cell's record; None if it does not exist, or has other flags than the cell has now."""
    path = cell_file(folder, cell)
    if not path.exists():
        return None
    record = read_file(path)
    return record if record.flags == cell.flags and record.processes == cell.processes else None


def read_file(path: Path) -> CellRecord:
    """Raises ConfigurationError for a file that is not a cell's record, or was edited."""
    values = read_json_object(path)
    written = values.pop(OWN_DIGEST, None)
    if written != json_digest(values) and (written or "provenance" in values):  # the oldest records have neither
        raise ConfigurationError(f"{path} was changed after it was written: remove it to run the cell again.")
    try:
        tuples = {name: tuple(values[name]) for name in ("flags", "score_command")}
        for source in values.get("provenance", {}).values():
            if not isinstance(source["data_sha256"], Mapping) or "cell_sha256" not in source:
                raise TypeError("its provenance")
        return CellRecord(**{**values, **tuples})
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigurationError(f"{path} is not the file of a cell ({error!r}): remove it to run the cell.") from error


def of_cell(cell: Cell, status: str, **values: Any) -> CellRecord:
    """A record of `cell`, with this environment's versions."""
    return CellRecord(**_declared(cell), status=status, versions=versions(), **values)


def _declared(cell: Cell) -> dict[str, Any]:
    return {name: getattr(cell, name) for name in DECLARED}


def from_metrics(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The fields of a `CellRecord` that come from the lines of metrics.jsonl."""
    last = records[-1]
    steps = [record["step_seconds"] for record in records if record.get("step_seconds")]
    step_seconds = sum(steps) / len(steps) if steps else None
    epochs = last.get("epoch") or 0
    curves = {
        name: [
            [record["iteration"], round(record.get("epoch") or 0.0, 6), round(record[name], 6)]
            for record in records
            if record.get(name) is not None
        ]
        for name in CURVES
    }
    return {
        "iterations": last["iteration"],
        "validation_loss": last.get("validation_loss"),
        "step_seconds": step_seconds,
        "epoch_seconds": step_seconds * last["iteration"] / epochs if step_seconds and epochs else None,
        "peak_memory_bytes": max((record.get("peak_memory_bytes") or 0 for record in records), default=0) or None,
        "curves": {name: _thinned(curve, MOST_POINTS) for name, curve in curves.items() if curve},
    }


def by_layer(records: Sequence[Mapping[str, Any]], name: str) -> dict[str, Any]:
    """The field of what lines have of every layer under `name`, thinned: 120 layers would fill the file."""
    kept = _thinned([record for record in records if record.get(name)], MOST_OF_LAYERS)
    layers = kept[-1][name] if kept else {}
    values = {layer: [_rounded(record[name][layer]) for record in kept] for layer in layers}
    return {"iterations": [record["iteration"] for record in kept], "by_layer": values} if kept else {}


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.3g}")


def _thinned(points: Sequence[Any], most: int) -> list[Any]:
    """Some `most` evenly spaced points, always with the last one."""
    step = -(-len(points) // most) or 1
    return [point for at, point in enumerate(points) if at % step == 0 or at == len(points) - 1]


def trainable_parameters(log: str) -> int | None:
    """The number that a run prints at its start."""
    printed = TRAINABLE.search(log)
    return int(printed.group(1).replace(",", "")) if printed else None


def test_loss(log: str) -> float | None:
    """The last one that a run printed; None without test data."""
    printed = TESTED.findall(log)
    return float(printed[-1]) if printed else None


def from_items(lines: Sequence[Mapping[str, Any]]) -> list[list[float]]:
    """A loss's part of a record's `items`: the last line of validation_items.jsonl or test_items.jsonl."""
    if not lines or None in lines[-1]["loss_sums"].values():  # not finite: no item would be worth comparing
        return []
    pairs = zip(lines[-1]["loss_sums"].values(), lines[-1]["num_tokens"].values(), strict=True)
    return [[round(loss_sum, 6), count] for loss_sum, count in pairs]


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that the numbers depend on, without those that are not installed."""
    installed = {"python": platform.python_version(), "machine": platform.machine()}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            installed[package] = version(package)
    return installed | source_version()


def source_version() -> dict[str, str]:
    """The commit of this source, and whether it has changes; empty outside a git checkout."""
    git = ["git", "-C", str(Path(__file__).parent)]
    state = ["status", "--porcelain", "--untracked-files=no", ":/"]
    try:
        commit, changes = (
            subprocess.check_output([*git, *words], text=True, stderr=subprocess.DEVNULL).strip()
            for words in (["rev-parse", "HEAD"], state)
        )
    except (OSError, subprocess.CalledProcessError):
        return {}
    return {"commit": commit + (" with changes" if changes else "")}


# Provenance: when the runner starts a process, it records digests (sha256) of the experiment's file, of the cell's
# entry in it and of the data. The digest of a cell covers that entry alone: a record stays valid when the file gains a
# method or a task, but not if it was moved from another experiment or its flags were rewritten.

DATA_FLAGS = ("--train-data-path", "--valid-data-path", "--test-data-path", "--data-path", "--include-path")


def source_of(experiment: str, cell: Cell, score: ScoreSpec | None = None) -> dict[str, Any]:
    """The provenance of a cell's training, or of its score with the commit: a cell may be scored later.

    Args: experiment: the text of the experiment's file.
    """
    files: dict[str, str] = {}  # that the data flags of the command name, with those of a prefix and of a folder
    for flag, words in _by_flag(score.command if score else cell.flags).items():
        for path in map(Path, words if flag in DATA_FLAGS else ()):
            candidates = sorted(path.iterdir()) if path.is_dir() else [path, Path(f"{path}.bin"), Path(f"{path}.idx")]
            files |= {str(file): file_digest(file) for file in candidates if file.is_file()}
    return {
        "experiment_sha256": hashlib.sha256(experiment.encode()).hexdigest(),
        "cell_sha256": _cell_digest(cell, score),
        "data_sha256": files,
        **(source_version() if score else {}),
    }


def _cell_digest(cell: Cell, score: ScoreSpec | None = None) -> str:
    return json_digest([_declared(cell), asdict(score)] if score else _declared(cell))


def json_digest(value: Any) -> str:
    """SHA-256 of a value of JSON, in hexadecimal digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _by_flag(words: Sequence[str]) -> dict[str, list[str]]:
    """`--lr 0.1 --bf16` -> {"--lr": ["0.1"], "--bf16": []}; words before the first flag are left out."""
    flags: dict[str, list[str]] = {}
    values: list[str] = []
    for word in words:
        if word.startswith("--"):
            values = flags.setdefault(word, [])
        else:
            values.append(word)
    return flags


def misfits(cell: Cell, score: ScoreSpec | None, record: CellRecord) -> list[str]:
    """The differences between a record and the cell of the experiment's file."""
    differences = [
        f"{name} is {getattr(record, name)!r} and {value!r} in the file"
        for name, value in _declared(cell).items()
        if name != "flags" and getattr(record, name) != value
    ]
    ran, wanted = (
        {flag: " ".join(words) or "given" for flag, words in _by_flag(flags).items()}
        for flags in (record.flags, cell.flags)
    )
    differences += [
        f"{flag} is {ran.get(flag, 'absent')} and {wanted.get(flag, 'absent')} in the file"
        for flag in sorted(ran.keys() | wanted.keys())
        if ran.get(flag) != wanted.get(flag)
    ]
    if differences or record.flags != cell.flags:
        return differences or ["its flags are in another order than in the file"]
    digests = {"training": _cell_digest(cell), "score": _cell_digest(cell, score) if score else "none"}
    return [
        f"its {name} was produced from a different entry than the file's: digest {str(source['cell_sha256'])[:12]}, "
        f"not {digests.get(name, 'none')[:12]}"
        for name, source in record.provenance.items()
        if str(source["cell_sha256"]) != digests.get(name)
    ]
