"""Resident memory of a process, its peak, and its bytes read, as Linux tells them."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from megatron_peft.benchmarks.subjects import STEPS, Setting, join, leave
from megatron_peft.runtime.ranks import run_ranks

MIB = 2**20
NUM_STEPS = 3
TIMEOUT_SECONDS = 1200.0


@dataclass(frozen=True)
class Peak:
    """Bytes: the largest resident set of a process, and what was resident before the model was built."""

    peak: int
    start: int

    @property
    def above_start(self) -> int:
        return self.peak - self.start


@dataclass(frozen=True)
class StepsJob:
    """One of `STEPS`, alone."""

    setting: Setting
    name: str
    num_steps: int = NUM_STEPS


def peak_of_steps(setting: Setting, name: str, num_steps: int = NUM_STEPS) -> Peak:
    """Of some steps of one subject in a fresh process of one rank."""
    return run_ranks(1, run_steps, StepsJob(setting, name, num_steps), timeout=TIMEOUT_SECONDS)[0]


def run_steps(job: StepsJob) -> Peak:
    """Started on a rank."""
    join(job.setting)
    start = resident_bytes()
    step = STEPS[job.name](job.setting)
    for _ in range(job.num_steps):
        step()
    leave()
    return Peak(peak_resident_bytes(), start)


def resident_bytes() -> int:
    """Of this process, now."""
    return _status("VmRSS")


def peak_resident_bytes() -> int:
    """The high-water mark of this process."""
    return _status("VmHWM")


def peak_of_bare_torch() -> int:
    """The high-water mark of an interpreter that has imported torch and nothing else."""
    program = "import torch; print(open('/proc/self/status').read())"
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    return _field(printed, "VmHWM")


def _status(name: str) -> int:
    return _field(Path("/proc/self/status").read_text(), name)


def _field(status: str, name: str) -> int:
    """`VmHWM:   1234 kB` in bytes."""
    line = next(line for line in status.splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024
