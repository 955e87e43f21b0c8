"""Records of cells that ended: settings, versions, validation loss, curves and scores.

The runner writes each as `cells/KEY.json`. A report keeps all of them in one `cells.parquet`, from which it can be made
again. A record counts only while its cell has the same flags in the experiment's file.
"""

import hashlib
import json
import platform
import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, asdict, dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from megatron_peft.checkpoint.folders import write_atomically
from megatron_peft.config import ConfigurationError, require
from megatron_peft.config.errors import validation_problems
from megatron_peft.config.untrusted import parse_json, read_json_object
from megatron_peft.experiment.cells import Cell
from megatron_peft.experiment.spec import AREA, TEST_LOSS, VALIDATION_LOSS, ScoreSpec
from megatron_peft.training.metrics import finite

CELLS, PARQUET = "cells", "cells.parquet"
MAX_POINTS = 200  # of a curve; longer ones are thinned
MAX_LAYER_POINTS = 20  # iterations of each layer
TRAINABLE = re.compile(r"trainable parameters: ([\d,]+) of")  # of training.terminal
TESTED = re.compile(r"test loss at iteration \d+: ([\d.E+-]+)")  # of training.loop
STOPPED = re.compile(r"(asked to stop|--exit-interval reached) at iteration \d+")  # of training.loop, with exit code 0
NOT_FINITE = "is NaN or infinite"  # of training.step
PACKAGES = ("megatron-peft", "megatron-core", "torch", "transformers")
DATA_FLAGS = ("--train-data-path", "--valid-data-path", "--test-data-path", "--data-path", "--include-path")

Status = Literal["trained", "failed", "diverged"]
Number = Annotated[int, Field(ge=-(2**63), lt=2**63)] | float
Point = Annotated[list[Number], Field(min_length=3, max_length=3)]  # iteration, epoch, value
Item = Annotated[list[Number], Field(min_length=2, max_length=2)]  # sum, count


@dataclass(frozen=True)
class ByLayer:
    """Values of each layer at some iterations."""

    iterations: list[int] = field(default_factory=list)
    by_layer: dict[str, list[float | None]] = field(default_factory=dict)


@dataclass(frozen=True)
class CellRecord(Cell):
    """A cell as it ran, and its results.

    status: "trained", "failed", or "diverged": tried with a rate that was too high; reason: the end of a failure's log.
    validation_loss: at the end of the run; None if it failed or measured none. test_loss: the same of --test-data-path.
    curves: name -> [[iteration, epoch, value], ...].
    lambdas: the Hybrid's of each layer; empty for other methods.
    grad_norms: of each transformer layer; empty without --log-grad-norm-by-layer.
    seconds, cpu_seconds: of the training's processes, with their start and validations; None if it was resumed.
    epoch_seconds: time of one pass over the training data, from the mean time of a step.
    scores: name of the metric -> number; score: the task's `score:` that they are of, as a dict.
    items: metric -> [[sum, count], ...] of each test item, where they are known: the sum of the losses of a sample's
        tokens and their number, or a score and 1. The metric is the sum of the sums over that of the counts.
    versions: of Python and packages, and the commit, when the training began.
    data: path -> sha256 of each file that the training or the score read.
    contrasts: `contrasts.asked` when the training began.
    """

    status: Status = "failed"
    started_at: str = ""
    seconds: float | None = 0.0
    validation_loss: float | None = None
    test_loss: float | None = None
    iterations: int = 0
    trainable_parameters: int | None = None
    step_seconds: float | None = None
    epoch_seconds: float | None = None
    cpu_seconds: float | None = None
    peak_memory_bytes: int | None = None
    score_seconds: float = 0.0
    reason: str = ""
    scores: Mapping[str, float] = field(default_factory=dict)
    score: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    data: Mapping[str, str] = field(default_factory=dict)
    contrasts: Mapping[str, Any] = field(default_factory=dict)
    curves: dict[str, list[Point]] = field(default_factory=dict)
    lambdas: ByLayer = field(default_factory=ByLayer)
    grad_norms: ByLayer = field(default_factory=ByLayer)
    items: dict[str, list[Item]] = field(default_factory=dict)

    @property
    def is_trained(self) -> bool:
        return self.status in ("trained", "diverged")

    def value(self, metric: str) -> float | None:
        """Return a score, the last validation or test loss, or the mean of all validation losses."""
        losses = [loss for _, _, loss in self.curves.get("validation_loss", ())]
        of_run = {VALIDATION_LOSS: self.validation_loss, TEST_LOSS: self.test_loss}
        return {**of_run, AREA: fmean(losses) if losses else None, **self.scores}.get(metric)

    def has_scores(self, score: ScoreSpec) -> bool:
        """Return True if the record holds every number of this score, made by its command."""
        is_same = not self.score or self.score == as_json(score)  # older records lack it
        return self.is_trained and is_same and score.metrics.keys() <= self.scores.keys()


RECORD = TypeAdapter(CellRecord)
NESTED = ["settings", "flags", *(each.name for each in fields(CellRecord) if each.default_factory is not MISSING)]


def as_json(value: Any) -> Any:
    """Return a dataclass as it reads after a round trip through JSON."""
    return parse_json(json.dumps(asdict(value)), "a score")


def cell_file(folder: Path, cell: Cell) -> Path:
    """Return the path of the cell's record."""
    return folder / CELLS / f"{cell.key}.json"


def write_record(folder: Path, record: CellRecord) -> None:
    path = cell_file(folder, record)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(finite(asdict(record)), ensure_ascii=False) + "\n")


def write_parquet(path: Path, records: Iterable[CellRecord]) -> None:
    """Write a row for each record; its mappings and lists are JSON."""
    import pyarrow as pa
    from pyarrow import parquet

    rows = [
        {name: json.dumps(value) if name in NESTED else value for name, value in finite(asdict(record)).items()}
        for record in records
    ]
    sink = pa.BufferOutputStream()
    parquet.write_table(pa.Table.from_pylist(rows), sink, compression="zstd")
    write_atomically(path, sink.getvalue().to_pybytes())


def read_records(folder: Path) -> dict[str, CellRecord]:
    """Return all records of a folder by the cell's key, those of single files before those of `cells.parquet`.

    Raises ConfigurationError: a file is damaged, or is not of cells.
    """
    rows = {}
    if (path := folder / PARQUET).is_file():
        import pyarrow as pa
        from pyarrow import parquet

        try:
            table = parquet.ParquetFile(path).read().to_pylist()
        except (OSError, pa.ArrowException) as error:
            raise ConfigurationError(f"{path} cannot be read: {error}.") from error
        for row in table:
            nested = {name: parse_json(row[name], f"{path}, {name}") for name in NESTED if name in row}
            record = _record({**row, **nested}, path)
            rows[record.key] = record
    for path in sorted((folder / CELLS).glob("*.json")):
        rows[path.stem] = record = _record(read_json_object(path), path)
        require(record.key == path.stem, f"{path} is the record of {record.key}: give it its name again.")
    return rows


def _record(values: Mapping[str, Any], path: Path) -> CellRecord:
    try:
        return RECORD.validate_python(values)
    except ValidationError as error:
        first = next(validation_problems(error)).rstrip(".")
        raise ConfigurationError(f"{path} is not the record of a cell ({first}): remove it to run the cell.") from error


def of_cell(cell: Cell, status: Status = "failed", **values: Any) -> CellRecord:
    """Return a record of `cell`, with this environment's versions."""
    declared = {each.name: getattr(cell, each.name) for each in fields(Cell)}
    return CellRecord(**declared, status=status, versions=versions(), **values)


# From the files of a run to the fields of its record.


def from_metrics(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the fields of a `CellRecord` that come from the lines of metrics.jsonl."""
    last = records[-1]
    steps = [record["step_seconds"] for record in records if record.get("step_seconds")]
    step_seconds, epochs = fmean(steps) if steps else None, last.get("epoch") or 0
    curves = {
        name: [
            [record["iteration"], round(record.get("epoch") or 0.0, 6), round(record[name], 6)]
            for record in records
            if record.get(name) is not None
        ]
        for name in ("loss", "grad_norm", "validation_loss")
    }
    return {
        "iterations": last["iteration"],
        "validation_loss": last.get("validation_loss"),
        "step_seconds": step_seconds,
        "epoch_seconds": step_seconds * last["iteration"] / epochs if step_seconds and epochs else None,
        "peak_memory_bytes": max((record.get("peak_memory_bytes") or 0 for record in records), default=0) or None,
        "curves": {name: _thinned(curve, MAX_POINTS) for name, curve in curves.items() if curve},
    }


def from_log(log: str) -> dict[str, Any]:
    """Return the fields that a run prints: trained parameters, and the last test loss."""
    parameters, losses = TRAINABLE.search(log), TESTED.findall(log)
    return {
        "trainable_parameters": int(parameters[1].replace(",", "")) if parameters else None,
        "test_loss": float(losses[-1]) if losses else None,
    }


def by_layer(records: Sequence[Mapping[str, Any]], name: str) -> ByLayer:
    """Return the values of every layer under `name`, thinned: 120 layers would fill the file."""
    chosen = _thinned([record for record in records if record.get(name)], MAX_LAYER_POINTS)
    layers = chosen[-1][name] if chosen else {}
    values = {
        layer: [None if (value := record[name][layer]) is None else float(f"{value:.3g}") for record in chosen]
        for layer in layers
    }
    return ByLayer([record["iteration"] for record in chosen], values)


def _thinned(points: Sequence[Any], most: int) -> list[Any]:
    """Return some `most` evenly spaced points, always with the last one."""
    step = -(-len(points) // most) or 1
    return [point for at, point in enumerate(points) if at % step == 0 or at == len(points) - 1]


def from_items(lines: Sequence[Mapping[str, Any]]) -> list[list[float]]:
    """Return a loss's part of `items`: the last line of validation_items.jsonl or test_items.jsonl, if it is finite."""
    if not lines or None in lines[-1]["loss_sums"].values():
        return []
    pairs = zip(lines[-1]["loss_sums"].values(), lines[-1]["num_tokens"].values(), strict=True)
    return [[round(loss_sum, 6), count] for loss_sum, count in pairs]


def versions() -> dict[str, str]:
    """Return the versions of Python and of installed packages that the numbers depend on, and the commit."""
    installed = {"python": platform.python_version(), "machine": platform.machine()}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            installed[package] = version(package)
    return installed | source_version()


def source_version() -> dict[str, str]:
    """Return the commit of this source, and whether it has changes; empty outside a git checkout."""
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


def data_digests(words: Sequence[str]) -> dict[str, str]:
    """Return path -> sha256 of the files that the data flags of a command name, with those of a prefix or a folder."""
    files, flag = {}, ""
    for word in words:
        flag = word if word.startswith("--") else flag
        path = Path(word)
        if flag in DATA_FLAGS and word != flag:
            candidates = sorted(path.iterdir()) if path.is_dir() else [path, Path(f"{path}.bin"), Path(f"{path}.idx")]
            for each in candidates:
                if each.is_file():
                    with each.open("rb") as file:
                        files[str(each)] = hashlib.file_digest(file, "sha256").hexdigest()
    return files
