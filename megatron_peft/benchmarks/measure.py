"""CPU seconds of several steps that take turns, so that whatever else the machine does falls on all of them alike.

CPU seconds of all threads of the process, not wall time: waiting for another rank or for a core costs nothing.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import torch
import torch.distributed as dist

from megatron_peft.benchmarks.subjects import STEPS, Setting, Step, join, leave

NUM_WARMUPS = 2
FEWEST_TURNS = 3
MAX_SECONDS = 300.0  # of wall time: no turn begins after that, so that a benchmark ends on a busy machine too


@dataclass(frozen=True)
class TurnsJob:
    """Which of `STEPS` take turns, and how often."""

    setting: Setting
    names: tuple[str, ...]
    num_turns: int


def time_turns(job: TurnsJob) -> dict[str, list[float]]:
    """CPU seconds of every turn on this rank, by name. Started on ranks."""
    torch.set_num_threads(1)
    join(job.setting)
    steps = {name: STEPS[name](job.setting) for name in job.names}
    seconds = take_turns(steps, job.num_turns, _Limit(MAX_SECONDS).is_over)
    leave()
    return seconds


class _Limit:
    """Wall time from now on, over when it is over on any rank."""

    def __init__(self, max_seconds: float) -> None:
        self.end = time.monotonic() + max_seconds

    def is_over(self) -> bool:
        over = torch.tensor(time.monotonic() > self.end, dtype=torch.int32)
        dist.all_reduce(over, dist.ReduceOp.MAX)
        return bool(over)


def take_turns(
    steps: Mapping[str, Step], num_turns: int, is_late: Callable[[], bool] = lambda: False
) -> dict[str, list[float]]:
    """CPU seconds of each step in each turn, after `NUM_WARMUPS` turns that do not count.

    Every second turn runs the other way round, so that no step always follows the same one. When it is late the turns
    end after `FEWEST_TURNS`.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(-NUM_WARMUPS, num_turns):
        if is_late() and turn >= FEWEST_TURNS:
            break
        for name in list(steps)[:: -1 if turn % 2 else 1]:
            spent = _cpu_seconds(steps[name])
            if turn >= 0:
                seconds[name].append(spent)
    return seconds


def over_ranks(by_rank: Sequence[Mapping[str, Sequence[float]]]) -> dict[str, list[float]]:
    """CPU seconds of all ranks together, turn by turn."""
    return {name: [sum(turn) for turn in zip(*(r[name] for r in by_rank), strict=True)] for name in by_rank[0]}


def median_ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """The median over the turns of one's seconds over the other's."""
    return median(a / b for a, b in zip(above, below, strict=True))


def _cpu_seconds(step: Step) -> float:
    start = time.process_time()
    step()
    return time.process_time() - start
