"""What tests of the sandbox share: their mark, and programs that count.

Where bubblewrap is missing or may do nothing, marked tests are skipped and say so; where it works, a sandbox that
refuses is a failure.
"""

import subprocess
from pathlib import Path

import pytest

from megatron_peft.evaluation.sandbox import Program, find_bubblewrap, open_sandbox


def _reason() -> str:
    if (bubblewrap := find_bubblewrap()) is None:
        return "there is no bwrap"
    command = [bubblewrap, "--unshare-pid", "--unshare-net", "--ro-bind", "/", "/", "true"]
    tried = subprocess.run(command, capture_output=True, text=True)
    return f"{bubblewrap} may not make namespaces: {tried.stderr.strip()}" if tried.returncode else ""


REASON = _reason()
needs_bubblewrap = pytest.mark.skipif(bool(REASON), reason=f"NOT TESTED, there is no sandbox here: {REASON}")


# Honest, and as many processes as a program may have.
THREADS = """
import threading, time
threads = [threading.Thread(target=time.sleep, args=(2,)) for _ in range(3)]
for thread in threads: thread.start()
for thread in threads: thread.join()
"""


def print_verdicts_of_threads(num_programs: int) -> None:
    """Of programs that run all at the same time."""
    outcomes = open_sandbox().run_all([Program(THREADS)] * num_programs, workers=num_programs)
    print(*(outcome.verdict for outcome in outcomes), sep="\n")


def read(file: Path) -> bytes:
    """Nothing of a process that has ended meanwhile."""
    try:
        return file.read_bytes()
    except OSError:
        return b""
