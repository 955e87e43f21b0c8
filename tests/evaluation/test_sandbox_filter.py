"""The filter, run by an interpreter of the few instructions it is made of, and by the kernel."""

from __future__ import annotations

import errno
import os
import re
import struct
from pathlib import Path

import pytest

from megatron_peft.config_error import ConfigurationError
from megatron_peft.evaluation.sandbox import open_sandbox
from megatron_peft.evaluation.sandbox_filter import MACHINES, seccomp_filter
from tests.evaluation.confined import needs_bubblewrap

ALLOW, KILL = 0x7FFF0000, 0x80000000
REFUSE, MISSING = 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS
READ = {"x86_64": 0, "aarch64": 63}
FLAGS_OF_NAMESPACES = [0x80, 0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000]
# What no program may call, with the kernel's numbers on each machine: copied from its headers, not from the filter.
MACHINE_NAMES = ("x86_64", "aarch64")
FORBIDDEN = """
    socket 41 198 shmget 29 194 shmat 30 196 semget 64 190 msgget 68 186 mq_open 240 180 memfd_create 319 279
    memfd_secret 447 447 ptrace 101 117 process_vm_readv 310 270 process_vm_writev 311 271 unshare 272 97 setns 308 268
    mount 165 40 umount2 166 39 pivot_root 155 41 chroot 161 51 open_by_handle_at 304 265 io_uring_setup 425 425
    bpf 321 280 userfaultfd 323 282 perf_event_open 298 241 add_key 248 217 request_key 249 218 keyctl 250 219"""
CALL_ALL = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
for number in {numbers}:
    ctypes.set_errno(0)
    libc.syscall(number, -1, -1, -1, -1, -1)
    print(number, ctypes.get_errno())
"""
CONDITIONS = {0x15: lambda a, b: a == b, 0x35: lambda a, b: a >= b, 0x45: lambda a, b: bool(a & b)}


def answer(program: bytes, architecture: int, number: int, first_argument: int = 0) -> int:
    """What the kernel would return for a system call."""
    data, steps = struct.pack("=IIQQ", number, architecture, 0, first_argument), [*struct.iter_unpack("=HBBI", program)]
    at = loaded = 0
    while True:
        code, if_true, if_false, value = steps[at]
        if code == 0x06:
            return value
        if code == 0x20:
            (loaded,) = struct.unpack_from("=I", data, value)
        else:
            at += if_true if CONDITIONS[code](loaded, value) else if_false
        at += 1


def forbidden(machine_name: str) -> dict[str, int]:
    words = FORBIDDEN.split()
    return dict(zip(words[::3], map(int, words[1 + MACHINE_NAMES.index(machine_name) :: 3]), strict=True))


@pytest.mark.parametrize("name", MACHINE_NAMES)
def test_forbidden_calls_are_not_permitted(name: str) -> None:
    program = seccomp_filter(name)
    answers = {call: answer(program, MACHINES[name].audit, number) for call, number in forbidden(name).items()}
    assert answers == dict.fromkeys(answers, REFUSE)


@pytest.mark.parametrize("name", MACHINE_NAMES)
def test_numbers_are_those_of_the_kernel(name: str) -> None:
    header = Path(f"/usr/include/{name}-linux-gnu/asm/unistd_64.h")
    if not header.exists():
        pytest.skip(f"no {header} (linux-libc-dev)")
    found = {call: int(number) for call, number in re.findall(r"#define __NR_(\w+)\s+(\d+)", header.read_text())}
    assert forbidden(name).items() <= found.items()


@needs_bubblewrap
def test_the_kernel_refuses_forbidden_calls() -> None:
    numbers = forbidden(os.uname().machine).values()
    outcome = open_sandbox().run(CALL_ALL.format(numbers=list(numbers)))
    assert outcome.passed
    assert outcome.output.split() == [str(word) for number in numbers for word in (number, errno.EPERM)]


@pytest.mark.parametrize("name", MACHINES)
def test_ordinary_calls_pass(name: str) -> None:
    machine, program = MACHINES[name], seccomp_filter(name)
    assert answer(program, machine.audit, READ[name]) == ALLOW
    assert answer(program, machine.audit, machine.clone, 0x3D0F00) == ALLOW  # flags of a thread
    assert answer(program, machine.audit, machine.clone3) == MISSING


def test_a_namespace_and_other_architectures_and_abis_do_not_slip_past() -> None:
    program, machine = seccomp_filter("x86_64"), MACHINES["x86_64"]
    assert {answer(program, machine.audit, machine.clone, flag | 17) for flag in FLAGS_OF_NAMESPACES} == {REFUSE}
    assert answer(program, 0x40000003, 102) == KILL  # i386, through int 0x80
    assert answer(program, machine.audit, 0x40000000 + 41) == REFUSE  # x32
    with pytest.raises(ConfigurationError, match="x86_64 and aarch64, not of riscv64"):
        seccomp_filter("riscv64")
