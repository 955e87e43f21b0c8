"""Memory is what Linux says."""

from __future__ import annotations

import pytest

from megatron_peft.benchmark import memory
from megatron_peft.benchmark.subjects import Setting, Step

MIB = 2**20


def test_bytes_are_read_from_the_status() -> None:
    assert memory._field("Name:\tpython\nVmHWM:\t    2048 kB\nVmRSS:\t 1 kB\n", "VmHWM") == 2 * MIB


def test_peak_remembers_what_was_given_back() -> None:
    before = memory.peak_resident_bytes()
    taken = bytearray(before - memory.resident_bytes() + 64 * MIB)
    del taken
    assert memory.peak_resident_bytes() >= before + 48 * MIB
    assert memory.resident_bytes() < memory.peak_resident_bytes() - 32 * MIB


def test_bare_torch_is_smaller_than_this_process() -> None:
    assert 50 * MIB < memory.peak_of_bare_torch() < memory.peak_resident_bytes()


def test_memory_of_the_model_and_of_a_step_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(setting: Setting) -> Step:
        model = bytearray(40 * MIB)
        return lambda: len(model + bytearray(len(model)))

    monkeypatch.setattr(memory, "join", lambda setting: None)
    monkeypatch.setattr(memory, "leave", lambda: None)
    monkeypatch.setattr(memory, "STEPS", {"big": build})
    monkeypatch.setattr(memory, "run_ranks", lambda num_ranks, target, job, timeout: [memory.run_steps(job)])
    assert memory.peak_of_steps(Setting("nowhere"), "big").above_start > 100 * MIB
