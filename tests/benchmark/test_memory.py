"""Memory is what Linux says."""

from __future__ import annotations

from megatron_peft.benchmark import memory
from megatron_peft.benchmark.memory import Peak
from megatron_peft.benchmark.subjects import Setting

MIB = 2**20


def test_bytes_are_read_from_the_status() -> None:
    assert memory._field("Name:\tpython\nVmHWM:\t    2048 kB\nVmRSS:\t 1 kB\n", "VmHWM") == 2 * MIB


def test_peak_remembers_what_was_given_back() -> None:
    before = memory.peak_resident_bytes()
    taken = bytearray(before - memory.resident_bytes() + 64 * MIB)
    del taken
    assert memory.peak_resident_bytes() >= before + 48 * MIB
    assert memory.resident_bytes() < memory.peak_resident_bytes() - 32 * MIB


def test_bare_torch_is_smaller_than_a_step(tiny: Setting) -> None:
    assert 50 * MIB < memory.peak_of_bare_torch() < memory.peak_of_steps(tiny, "full").peak


def test_what_was_there_before_does_not_count() -> None:
    assert Peak(peak=300, start=100).above_start == 200
