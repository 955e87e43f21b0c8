"""Milliseconds and kernels of a step on the device, and the timed steps. docs/rehearsal.md starts from them."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from megatron_peft.adapters.step import AdaptersStep
from megatron_peft.benchmarks.measure import Figure
from megatron_peft.training.state import TrainingState
from megatron_peft.training.step import finish_with, run_schedule
from tests.benchmarks.gpu_subjects import device, random_microbatch

NUM_WARMUPS = 2


def milliseconds(step: Callable[[], Any], turns: int) -> float:
    """The median, by CUDA events; on a CPU by the clock."""
    timed = _by_events if device().type == "cuda" else _by_clock
    for _ in range(NUM_WARMUPS):
        step()
    return median(timed(step) for _ in range(turns))


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


@dataclass(frozen=True)
class Kernel:
    """One launch: its name, and when it ran, in microseconds."""

    name: str
    start: float
    end: float


def kernels_of(step: Callable[[], Any]) -> list[Kernel]:
    """What ran on the device, in order; on a CPU torch's operators that call no other one."""
    is_cuda = device().type == "cuda"
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


def microbatch_step(state: TrainingState, tokens: int) -> Callable[[], Any]:
    """Forward and backward of one microbatch of a run, with the blocks of rotations built once before."""
    AdaptersStep(state.model_chunks).begin()
    finish_with(state.model_chunks, lambda *_, **__: None)
    return partial(run_schedule, state.model_chunks, [random_microbatch(state.shape, tokens)], forward_only=False)


LINEAR_LAYERS = 4  # of a transformer layer
# A kernel is no operation: a product that is split along its inner side sums the parts in a second kernel, and where an
# adapter reads the input of linear_fc2, SwiGLU is computed again. So twice the operations, which is an estimate.
KERNELS_AN_OPERATION = 2


def added_kernels(name: str, number: int, operations: int | None) -> Figure:
    """Kernels of a layer beyond those of the frozen one.

    Without a target on a CPU, where views of tensors count too, and for methods of other packages.

    Args:
        operations: that the adapter adds to a linear layer, forward and backward.
    """
    if operations is None or device().type != "cuda":
        return Figure(name, number)
    note = f"{operations} operations in each of {LINEAR_LAYERS} linear layers"
    return Figure(name, number, KERNELS_AN_OPERATION * LINEAR_LAYERS * operations, note=note)
