"""LoRA-GA's start is timed a batch, over the frozen base."""

from __future__ import annotations

import os

import pytest

from megatron_peft.benchmark import lora_ga_start
from megatron_peft.benchmark.memory import resident_bytes
from megatron_peft.benchmark.subjects import Setting

MIB = 2**20


def test_what_is_freed_is_given_back(monkeypatch: pytest.MonkeyPatch):
    """In a process of its own, where large blocks have been freed before: then the C library keeps such ones."""

    def freed_mib(job: object) -> int:
        block = bytearray(24 * MIB)
        del block
        blocks = [bytearray(MIB) for _ in range(64)]
        full = resident_bytes()
        del blocks[:-1]
        return (full - resident_bytes()) // MIB

    monkeypatch.setattr(lora_ga_start, "run_steps", freed_mib)
    child = os.fork()
    if child == 0:
        os._exit(lora_ga_start.run_steps_giving_back(None))  # type: ignore[arg-type]
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) >= 60


def test_a_real_start_sees_every_batch_twice(monkeypatch: pytest.MonkeyPatch, tiny: Setting):
    """With two batches the start runs four, the frozen base three (one does not count)."""
    from megatron_peft.training import start

    runs = []
    schedule = start.run_schedule
    monkeypatch.setattr(lora_ga_start, "NUM_BATCHES", 2)
    monkeypatch.setattr(start, "run_schedule", lambda *args, **kwargs: runs.append(1) or schedule(*args, **kwargs))
    frozen, a_batch = lora_ga_start.time_start(tiny)
    assert len(runs) == 4 and frozen > 0 and a_batch > 0
