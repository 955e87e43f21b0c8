"""Figures one after another, of which some may fail; milliseconds and kernels of a step on the device."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from megatron_peft.benchmarks.measure import Figure

NUM_WARMUPS = 2


def attempt(name: str, measure: Callable[..., Figure | Iterable[Figure]], *arguments: Any) -> Iterator[Figure]:
    """The figures of `measure(name, *arguments)`; if it raises, one that has failed and says why: the line goes on.

    Once the device no longer answers, nothing else can be measured, and the exception ends the line.
    """
    try:
        found = measure(name, *arguments)
        yield from [found] if isinstance(found, Figure) else found
    except Exception as error:  # whatever it is, the other figures can be measured
        if not device_answers():
            raise
        yield Figure(name, math.inf, 0.0, note=f"{type(error).__name__}: {error}"[:400])


def device_answers() -> bool:
    """After an illegal access every call to CUDA fails, in this process for good."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


@dataclass(frozen=True)
class Kernel:
    """One launch: its name, and when it ran, in microseconds."""

    name: str
    start: float
    end: float


def milliseconds(step: Callable[[], Any], turns: int, device: torch.device) -> float:
    """The median, by CUDA events; on a CPU by the clock."""
    for _ in range(NUM_WARMUPS):
        step()
    return median(_by_events(step) if device.type == "cuda" else _by_clock(step) for _ in range(turns))


def _by_events(step: Callable[[], Any]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def _by_clock(step: Callable[[], Any]) -> float:
    start = time.perf_counter()
    step()
    return 1000 * (time.perf_counter() - start)


def kernels_of(step: Callable[[], Any], device: torch.device) -> list[Kernel]:
    """What ran on the device, in order; on a CPU torch's operators that call no other one."""
    is_cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_cuda else [])]) as profiled:
        step()
        torch.cuda.synchronize()
    events: Any = profiled.events()
    ran = [one for one in events if (_is_kernel(one) if is_cuda else _is_leaf(one))]
    kernels = [Kernel(one.name, one.time_range.start, one.time_range.end) for one in ran]
    return sorted((one for one in kernels if not one.name.startswith("Mem")), key=lambda one: one.start)


def _is_kernel(event: Any) -> bool:
    return event.device_type == DeviceType.CUDA and not event.is_user_annotation


def _is_leaf(event: Any) -> bool:
    return event.name.startswith("aten::") and not any(one.name.startswith("aten::") for one in event.cpu_children)


def busy_share(kernels: Sequence[Kernel]) -> float:
    """Share of the time from the first to the last kernel in which at least one was running."""
    busy, until = 0.0, 0.0
    for one in kernels:
        busy += max(one.end - max(one.start, until), 0.0)
        until = max(until, one.end)
    return busy / max(until - kernels[0].start, 1e-9) if kernels else 0.0
