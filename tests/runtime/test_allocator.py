"""Freed memory stays with the process or goes back to the system, whichever was asked for first."""

from __future__ import annotations

import subprocess
import sys

import pytest

STEP = "a = [torch.ones(2**20) for _ in range(64)]; del a"  # 64 blocks of 4 MiB
PAGES = 64 * 2**10
SCRIPT = """
import resource, torch
from megatron_peft.runtime.allocator import give_back_freed_memory, keep_freed_memory
{calls}
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    {step}
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def _new_pages_of_the_second_step(calls: str) -> int:
    script = SCRIPT.format(calls=calls, step=STEP)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    first, second = map(int, done.stdout.split())
    assert first >= PAGES
    return second


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's")
@pytest.mark.parametrize(
    ("calls", "pays_again"),
    [
        ("keep_freed_memory()", False),
        ("give_back_freed_memory()", True),
        ("give_back_freed_memory(); keep_freed_memory()", True),
    ],
)
def test_a_second_step_pays_for_its_pages_only_where_they_were_given_back(calls: str, pays_again: bool):
    assert (_new_pages_of_the_second_step(calls) > PAGES // 2) == pays_again
