"""System calls that a program in the sandbox may not make, as a seccomp filter.

Namespaces and limits confine files, processes and networks, but not everything: a System V segment or a memfd holds
memory that no process limit counts, vsock knows no network namespaces, a user namespace of one's own brings mounts
without a size, and a descriptor taken from the judge may be the pipe of the verdict. No program that a benchmark asks
for needs any of these, so they answer "not permitted".
"""

import errno
import platform
import struct
from dataclasses import dataclass

from megatron_peft.config import ConfigurationError

# name -> numbers on (x86_64, aarch64)
DENIED = {
    "socket": (41, 198),
    "shmget": (29, 194),
    "shmat": (30, 196),
    "semget": (64, 190),
    "msgget": (68, 186),
    "mq_open": (240, 180),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "pidfd_getfd": (438, 438),
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_by_handle_at": (304, 265),
    "io_uring_setup": (425, 425),
    "bpf": (321, 280),
    "userfaultfd": (323, 282),
    "perf_event_open": (298, 241),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
}
NEW_NAMESPACE = 0x7E020080  # the CLONE_NEW... flags: time, mount, cgroup, uts, ipc, user, pid, net


@dataclass(frozen=True)
class Machine:
    """What differs between processors: the audit number, the column of DENIED, and the calls that make processes."""

    audit: int
    column: int
    clone: int
    clone3: int = 435


MACHINES = {"x86_64": Machine(0xC000003E, 0, 56), "aarch64": Machine(0xC00000B7, 1, 220)}

# Classic BPF: operations, and offsets into the kernel's `struct seccomp_data`.
_LOAD, _IF_EQUAL, _IF_AT_LEAST, _IF_ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16
_ALLOW, _KILL, _FAIL = 0x7FFF0000, 0x80000000, 0x00050000
_X32 = 0x40000000  # calls of the x32 ABI have numbers of their own


def seccomp_filter(machine_name: str | None = None) -> bytes:
    """The filter for bwrap's --seccomp: `struct sock_filter` after `struct sock_filter`.

    Raises ConfigurationError on a processor whose system calls are not listed here.
    """
    name = machine_name or platform.machine()
    if name not in MACHINES:
        raise ConfigurationError(f"the sandbox knows the system calls of {' and '.join(MACHINES)}, not of {name}.")
    machine = MACHINES[name]
    refuse = _step(_RETURN, _FAIL | errno.EPERM)
    program = [
        _step(_LOAD, _ARCHITECTURE),
        _step(_IF_EQUAL, machine.audit, 1, 0),
        _step(_RETURN, _KILL),
        _step(_LOAD, _NUMBER),
        _step(_IF_AT_LEAST, _X32, 0, 1),
        refuse,
    ]
    for numbers in DENIED.values():
        program += [_step(_IF_EQUAL, numbers[machine.column], 0, 1), refuse]
    # clone3 hides its flags behind a pointer; without it the C library falls back to clone.
    program += [_step(_IF_EQUAL, machine.clone3, 0, 1), _step(_RETURN, _FAIL | errno.ENOSYS)]
    program += [_step(_IF_EQUAL, machine.clone, 0, 3), _step(_LOAD, _FIRST_ARGUMENT)]
    program += [_step(_IF_ANY_BIT, NEW_NAMESPACE, 0, 1), refuse, _step(_RETURN, _ALLOW)]
    return b"".join(program)


def _step(code: int, value: int, skip_if_true: int = 0, skip_if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, skip_if_true, skip_if_false, value)
