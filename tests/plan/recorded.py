"""Recorded layers for tests, each that differs once in a process of pytest; and what was recorded, counted."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from megatron_peft.config import RunConfig
from megatron_peft.models.shape import ModelShape
from megatron_peft.plan.recorded_step import RecordedStep
from megatron_peft.rehearsal.program import Computation, Entry, Product, RecordedLayers
from megatron_peft.rehearsal.rehearsal import record_layers
from megatron_peft.rehearsal.requests import LayersToRecord

_KNOWN: dict[str, RecordedLayers] = {}


def recorded(asked: Sequence[LayersToRecord], *_: Any) -> list[RecordedLayers]:
    """As `rehearsal.record_layers`."""
    return record_layers(asked, known=_KNOWN)


def step_of(run: RunConfig, shape: ModelShape) -> RecordedStep:
    """Of a run."""
    [layers] = recorded([LayersToRecord.of(run, shape)])
    return RecordedStep(run, shape, layers)


def products(entries: Iterable[Entry]) -> Counter[Product]:
    """How often each was computed."""
    counted: Counter[Product] = Counter()
    for entry in entries:
        if isinstance(entry, Computation):
            counted.update(entry.products)
    return counted
