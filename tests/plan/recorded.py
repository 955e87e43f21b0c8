"""Recorded layers for tests: each that differs is recorded once in a process of pytest."""

from collections.abc import Sequence
from typing import Any

from megatron_peft.config import RunConfig
from megatron_peft.models.shape import ModelShape
from megatron_peft.plan.recorded_layers import RecordedStep
from megatron_peft.rehearsal.asked import LayersToRecord
from megatron_peft.rehearsal.record import RecordedLayers
from megatron_peft.rehearsal.rehearsal import record_layers

_KNOWN: dict[str, RecordedLayers] = {}


def recorded(asked: Sequence[LayersToRecord], **_: Any) -> list[RecordedLayers]:
    """As `rehearsal.record_layers`."""
    new = {name: one for one in asked if (name := repr(one)) not in _KNOWN}
    _KNOWN.update(zip(new, record_layers([*new.values()]) if new else [], strict=True))
    return [_KNOWN[repr(one)] for one in asked]


def step_of(run: RunConfig, shape: ModelShape) -> RecordedStep:
    """Of a run."""
    [layers] = recorded([LayersToRecord.of(run, shape)])
    return RecordedStep(run, shape, layers)
