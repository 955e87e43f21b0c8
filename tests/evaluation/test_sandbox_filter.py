"""The filter, run by an interpreter of the few instructions it is made of."""

from __future__ import annotations

import errno
import struct

import pytest

from megatron_peft.config_error import ConfigurationError
from megatron_peft.evaluation.sandbox_filter import DENIED, MACHINES, seccomp_filter

ALLOW, KILL = 0x7FFF0000, 0x80000000
REFUSE, MISSING = 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS
READ = {"x86_64": 0, "aarch64": 63}
CONDITIONS = {0x15: lambda a, b: a == b, 0x35: lambda a, b: a >= b, 0x45: lambda a, b: bool(a & b)}


def answer(program: bytes, architecture: int, number: int, first_argument: int = 0) -> int:
    """What the kernel would return for a system call."""
    data = struct.pack("=IIQQ", number, architecture, 0, first_argument)
    steps = list(struct.iter_unpack("=HBBI", program))
    at, loaded = 0, 0
    while True:
        code, if_true, if_false, value = steps[at]
        if code == 0x06:
            return value
        if code == 0x20:
            (loaded,) = struct.unpack_from("=I", data, value)
        else:
            at += if_true if CONDITIONS[code](loaded, value) else if_false
        at += 1


@pytest.mark.parametrize("name", MACHINES)
def test_denied_calls_are_not_permitted(name: str) -> None:
    machine, program = MACHINES[name], seccomp_filter(name)
    answers = {call: answer(program, machine.audit, numbers[machine.column]) for call, numbers in DENIED.items()}
    assert answers == dict.fromkeys(DENIED, REFUSE)


@pytest.mark.parametrize("name", MACHINES)
def test_ordinary_calls_pass(name: str) -> None:
    machine, program = MACHINES[name], seccomp_filter(name)
    assert answer(program, machine.audit, READ[name]) == ALLOW
    assert answer(program, machine.audit, machine.clone, 0x3D0F00) == ALLOW  # flags of a thread
    assert answer(program, machine.audit, machine.clone3) == MISSING


@pytest.mark.parametrize("flag", [0x80, 0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000])
def test_clone_makes_no_namespace(flag: int) -> None:
    machine = MACHINES["x86_64"]
    assert answer(seccomp_filter("x86_64"), machine.audit, machine.clone, flag | 17) == REFUSE


def test_other_architectures_and_abis_do_not_slip_past() -> None:
    program = seccomp_filter("x86_64")
    assert answer(program, 0x40000003, 102) == KILL  # i386, through int 0x80
    assert answer(program, MACHINES["x86_64"].audit, 0x40000000 + 41) == REFUSE  # x32


def test_unknown_processor_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="x86_64 and aarch64, not of riscv64"):
        seccomp_filter("riscv64")
