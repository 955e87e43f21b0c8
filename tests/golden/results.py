"""What a run left behind, as numbers by name, and where two runs part."""

import json
import warnings
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as torch_checkpoint
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from tests.golden.cases import NOT_COMPARED, newest_name

Quantities = dict[str, Any]  # numbers, texts and tensors by name, in the order in which a run makes them
NEAR = 1e-6
FIRST = ("loss", "grad_norm")  # in a record of metrics; a difference there explains the others


def quantities(folder: Path) -> Quantities:
    """Of `run`, `answers.jsonl`, `said.jsonl`, `merged`, `exported`, *.json and *.yaml in a case's folder, if there."""
    run, models = folder / "run", [folder / name for name in ("merged", "exported")]
    found = [_metrics(run), _checkpoint(run), _answers(folder), _said(folder), *map(_json, [folder, *models])]
    return dict(chain(*found, *map(_weights, models)))


def first_difference(base: Quantities, work: Quantities) -> str | None:
    """The first quantity that differs by a bit, with both values in hexadecimal; None if there is none."""
    differing = [name for name in [*base, *(set(work) - set(base))] if _told(name, base, work)]
    if not differing:
        return None
    kinds: dict[str, int] = {}
    for name in differing:
        kind = name.partition(":")[0].partition(" ")[0]
        kinds[kind] = kinds.get(kind, 0) + 1
    also = ", ".join(f"{count} of {kind}" for kind, count in kinds.items())
    return f"{_told(differing[0], base, work)}\n    (differences: {also}; {len(base)} quantities are compared)"


def first_far(chunks: Quantities, whole: Quantities) -> str | None:
    """The first loss of a run in chunks that is further from that of whole logits than NEAR, relatively."""
    losses = {name: value for name, value in chunks.items() if name.endswith("loss")}
    assert losses and all(name in whole for name in losses)
    far = (name for name, value in losses.items() if not abs(value - whole[name]) <= NEAR * abs(whole[name]))
    name = next(far, None)
    return name and f"{name}: in chunks {chunks[name]}, of whole logits {whole[name]}"


def _told(name: str, base: Quantities, work: Quantities) -> str | None:
    if name not in base or name not in work:
        return f"{name}: only in {'the base' if name in base else 'the working tree'}"
    a, b = base[name], work[name]
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return None if _text(a) == _text(b) else f"{name}: base {_text(a)}, working tree {_text(b)}"
    kinds = [f"{tensor.dtype} {list(tensor.shape)}".removeprefix("torch.") for tensor in (a, b)]
    if kinds[0] != kinds[1]:
        return f"{name}: base {kinds[0]}, working tree {kinds[1]}"
    differs = _bits(a) != _bits(b)
    if not differs.any():
        return None
    at = int(differs.nonzero()[0])
    values = [_text(tensor.flatten()[at].item()) for tensor in (a, b)]
    index = [int(i) for i in torch.unravel_index(torch.tensor(at), a.shape)]
    return f"{name} {index}: base {values[0]}, working tree {values[1]} ({int(differs.sum())} of {a.numel()} differ)"


def _bits(tensor: Tensor) -> Tensor:
    """Integers of the elements' bits: NaN equals itself, and -0 is not 0."""
    sizes = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().flatten().view(sizes[tensor.element_size()])


def _text(value: Any) -> str:
    return value.hex() if isinstance(value, float) else repr(value)


def _metrics(run: Path) -> Iterator[tuple[str, Any]]:
    """Every field of every record but those that time decides, step by step."""
    records = [record for file in ("metrics", "lambda") for record in _records(run / f"{file}.jsonl")]
    for record in sorted(records, key=lambda record: record["iteration"]):  # a stable sort: metrics come first
        fields = sorted(_flat(record), key=lambda field: (field[0] not in FIRST, field[0] != FIRST[0]))
        yield from ((f"step {record['iteration']}: {name}", value) for name, value in fields)


def _records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _flat(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in record.items():
        full = prefix + newest_name(name)
        if isinstance(value, Mapping):
            yield from _flat(value, f"{full}/")
        elif isinstance(value, list) and value and all(isinstance(one, Mapping) for one in value):
            yield from _flat({str(place): one for place, one in enumerate(value)}, f"{full}/")
        elif full not in NOT_COMPARED:
            yield full, value


def saved_tensors(checkpoint: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint's folder, by torch's own reader, which needs nothing of a tree."""
    stored = torch_checkpoint.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    tensors: dict[str, Any] = {
        name: torch.empty(tuple(tensor.size), dtype=tensor.properties.dtype)
        for name, tensor in stored.items()
        if isinstance(tensor, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no world
        torch_checkpoint.load(tensors, checkpoint_id=checkpoint)
    return tensors


def _checkpoint(run: Path) -> Iterator[tuple[str, Tensor]]:
    """Of the newest checkpoint, whatever it is called."""
    newest = saved_tensors(max(run.rglob(".metadata")).parent) if run.exists() else {}
    named = {newest_name(name): tensor for name, tensor in newest.items()}
    yield from ((f"saved {name}", named[name]) for name in sorted(named))


def _answers(folder: Path) -> Iterator[tuple[str, Any]]:
    for number, record in enumerate(_records(folder / "answers.jsonl")):
        yield from ((f"answer {number}: {name}", value) for name, value in _flat(record))


def _weights(model: Path) -> Iterator[tuple[str, Tensor]]:
    for path in sorted(model.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            yield from ((f"{model.name} {name}", file.get_tensor(name)) for name in sorted(file.keys()))


def _json(folder: Path) -> Iterator[tuple[str, Any]]:
    for path in sorted(folder.glob("*.json")):
        yield from _flat(json.loads(path.read_text()), f"{path.name}: ")


def _said(folder: Path) -> Iterator[tuple[str, Any]]:
    """Of each command line its exit code and what it printed, line by line; then what it wrote as YAML."""
    for record in _records(folder / "said.jsonl"):
        line = record["line"]
        yield f"exit_code of {line}", record["exit_code"]
        for stream in ("err", "out"):
            text = record[stream].replace(record["cwd"], "FOLDER").replace(record["tree"], "TREE")
            yield from ((f"{stream} {n} of {line}", told) for n, told in enumerate(text.splitlines(), 1))
    for path in sorted(folder.glob("*.yaml")):
        yield from ((f"{path.name} {n}", told) for n, told in enumerate(path.read_text().splitlines(), 1))
