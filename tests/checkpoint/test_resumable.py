"""What a checkpoint asks of a run, the training loop's state has."""

from __future__ import annotations

import dataclasses

import pytest

from megatron_peft.checkpoint.resumable import Counters, Resumable
from megatron_peft.training.state import Position, TrainingState


@pytest.mark.parametrize(("asked", "given"), [(Resumable, TrainingState), (Counters, Position)])
def test_the_state_of_a_run_can_be_saved(asked: type, given: type) -> None:
    members = {*asked.__annotations__, *(name for name in vars(asked) if not name.startswith("_"))}
    assert members == {field.name for field in dataclasses.fields(given)}
