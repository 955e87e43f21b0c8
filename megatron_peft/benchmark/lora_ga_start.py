"""What LoRA-GA's start costs: CPU seconds a batch beside the frozen base's forward and backward, and memory.

A resident set holds what is in use and what the C library keeps of what was freed: for the same frozen step 120 MiB
more in one run than in another, which is more than is measured here. So both sides give back at once what they free.
"""

import time
from statistics import mean

import torch

from megatron_peft.benchmark.figures import Figure
from megatron_peft.benchmark.memory import MIB, Peak, StepsJob, run_steps
from megatron_peft.benchmarks.subjects import Setting, Step, frozen_step, join, leave, lora_ga_start
from megatron_peft.runtime.cpu_kernels import give_back_freed_memory
from megatron_peft.runtime.ranks import run_ranks

NUM_BATCHES = 8
MAX_RATIO, MAX_EXTRA_MIB = 2.3, 100.0
TIMEOUT_SECONDS = 1800.0


def lora_ga_start_figures(setting: Setting) -> list[Figure]:
    """Of a start from eight batches; memory of a start from one, since no batch adds to it."""
    frozen, start = run_ranks(1, time_start, setting, timeout=TIMEOUT_SECONDS)[0]
    peaks = [_peak(setting, name).peak / MIB for name in ("lora-ga-start", "frozen")]
    ratio, note = start / frozen, f"{start:.2f} and {frozen:.2f} CPU s a batch; {NUM_BATCHES} batches"
    sizes = f"peaks of {peaks[0]:,.0f} and {peaks[1]:,.0f} MiB"
    return [
        Figure("LoRA-GA's start, a batch / frozen forward and backward", ratio, MAX_RATIO, "", note),
        Figure(
            "LoRA-GA's start: peak memory above the frozen step's", peaks[0] - peaks[1], MAX_EXTRA_MIB, "MiB", sizes
        ),
    ]


def _peak(setting: Setting, name: str) -> Peak:
    job = StepsJob(setting, name, num_steps=1)
    return run_ranks(1, run_steps_giving_back, job, timeout=TIMEOUT_SECONDS)[0]


def run_steps_giving_back(job: StepsJob) -> Peak:
    """`run_steps` of a process that keeps nothing of what it frees. Started on a rank."""
    give_back_freed_memory()
    return run_steps(job)


def time_start(setting: Setting) -> tuple[float, float]:
    """CPU seconds a batch of the frozen base (half of them before the start, half after) and of the start."""
    torch.set_num_threads(1)
    join(setting)
    frozen, start = frozen_step(setting), lora_ga_start(setting, NUM_BATCHES)
    frozen()
    before = [_cpu_seconds(frozen) for _ in range(NUM_BATCHES // 2)]
    whole = _cpu_seconds(start)
    after = [_cpu_seconds(frozen) for _ in range(NUM_BATCHES // 2)]
    leave()
    return mean(before + after), whole / NUM_BATCHES


def _cpu_seconds(step: Step) -> float:
    begin = time.process_time()
    step()
    return time.process_time() - begin
