"""Freed memory stays with the process or goes back to the system, whichever was asked for first."""

import subprocess
import sys

import pytest

PAGES = 64 * 2**10
CALLS = {  # -> whether a second step pays for its pages again
    "keep_freed_memory()": False,
    "give_back_freed_memory()": True,
    "give_back_freed_memory(); keep_freed_memory()": True,
}
# Each in a process of its own, which has imported torch already. A step is 64 blocks of 4 MiB.
SCRIPT = f"""
import os, resource, torch
from megatron_peft.runtime.cpu_kernels import give_back_freed_memory, keep_freed_memory
for calls in {[*CALLS]}:
    if os.fork():
        os.wait()
        continue
    exec(calls)
    for _ in range(2):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        a = [torch.ones(2**20) for _ in range(64)]; del a
        print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, flush=True)
    os._exit(0)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's")
def test_a_second_step_pays_for_its_pages_only_where_they_were_given_back() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    new_pages = list(map(int, done.stdout.split()))
    assert min(new_pages[::2]) >= PAGES
    assert [second > PAGES // 2 for second in new_pages[1::2]] == list(CALLS.values()), new_pages
