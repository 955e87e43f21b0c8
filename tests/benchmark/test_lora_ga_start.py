"""LoRA-GA's start is timed a batch, over the frozen base."""

from __future__ import annotations

import pytest

from megatron_peft.benchmark import lora_ga_start
from megatron_peft.benchmark.memory import resident_bytes
from megatron_peft.benchmark.subjects import Setting
from tests.ranks import run_ranks

MIB = 2**20


def freed_mib(_: object) -> int:
    """What goes back to the system of 63 MiB. On a rank: a heap has holes after other tests, and fills them first."""

    def free(job: object) -> int:
        block = bytearray(24 * MIB)  # once such a block has been freed, the C library keeps smaller ones
        del block
        blocks = [bytearray(MIB) for _ in range(64)]
        full = resident_bytes()
        del blocks[:-1]
        return (full - resident_bytes()) // MIB

    lora_ga_start.run_steps = free  # type: ignore[assignment]
    return lora_ga_start.run_steps_giving_back(None)  # type: ignore[arg-type, return-value]


def test_what_is_freed_is_given_back():
    assert run_ranks(1, freed_mib)[0] >= 60


def test_a_real_start_sees_every_batch_twice(monkeypatch: pytest.MonkeyPatch, tiny: Setting):
    """With two batches the start runs four, the frozen base three (one does not count)."""
    from megatron_peft.training import start

    runs = []
    schedule = start.run_schedule
    monkeypatch.setattr(lora_ga_start, "NUM_BATCHES", 2)
    monkeypatch.setattr(start, "run_schedule", lambda *args, **kwargs: runs.append(1) or schedule(*args, **kwargs))
    frozen, a_batch = lora_ga_start.time_start(tiny)
    assert len(runs) == 4 and frozen > 0 and a_batch > 0
