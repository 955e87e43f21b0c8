"""What LoRA-GA's start found: a line for each kind of layer at the terminal, each layer's number in a file."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_peft.checkpoint.folders import write_atomically
from megatron_peft.config import PeftConfig

START_FILE = "lora_ga_start.json"


@dataclass(frozen=True)
class WholeStart:
    """Of the whole model.

    Args:
        peft: of the run.
        seconds: wall time of the start.
        energy: part of the gradient's squared norm in its r leading directions, by global name of the layer.
    """

    peft: PeftConfig
    seconds: float
    energy: Mapping[str, float]


def start_table(start: WholeStart, path: Path | None) -> str:
    """Mean, lowest and highest energy of each kind of layer.

    Args:
        path: where each layer's number is, if it was written.
    """
    kinds = sorted({_kind(name) for name in start.energy})
    lines = [
        f"LoRA-GA start ({start.peft.lora_ga_init}) took {start.seconds:.1f} s; part of the gradient's squared norm in "
        f"rank {start.peft.lora_rank}:",
        *(_line(kind, {n: v for n, v in start.energy.items() if _kind(n) == kind}) for kind in kinds),
        *([f"  each layer's: {path}"] if path else []),
    ]
    return "\n".join(lines)


def write_start(start: WholeStart, save: str | None) -> Path | None:
    """Write START_FILE beside metrics.jsonl. Returns its path; None without --save or where it cannot be written."""
    if save is None:
        return None
    path = Path(save) / START_FILE
    record = {
        "lora_ga_init": start.peft.lora_ga_init,
        "lora_ga_batches": start.peft.lora_ga_batches,
        "lora_rank": start.peft.lora_rank,
        "seconds": start.seconds,
        "energy": {name: start.energy[name] for name in sorted(start.energy, key=_place)},
    }
    try:
        write_atomically(path, json.dumps(record, indent=2) + "\n")
    except OSError:  # a full disk: the run's first checkpoint says so
        return None
    return path


def _line(kind: str, energy: Mapping[str, float]) -> str:
    lowest, highest = min(energy, key=energy.__getitem__), max(energy, key=energy.__getitem__)
    mean = sum(energy.values()) / len(energy)
    return (
        f"  {kind:<12} {len(energy):4d} layers   mean {mean:.3f}   lowest {energy[lowest]:.3f} (layer "
        f"{_layer(lowest)})   highest {energy[highest]:.3f} (layer {_layer(highest)})"
    )


def _kind(name: str) -> str:
    return name.rpartition(".")[2]


def _layer(name: str) -> int:
    return int(name.split(".")[2])


def _place(name: str) -> tuple[int, str]:
    return _layer(name), name
