"""From which size of group on fast Fourier transforms turn a uRNN layer's features faster than dense blocks."""

from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from megatron_peft.adapters.rotation import rotate
from megatron_peft.adapters.urnn import DENSE_UP_TO, StructuredUrnn, rotate_by_fourier
from megatron_peft.benchmark.figures import Figure
from megatron_peft.benchmarks.measure import median_ratio, take_turns
from megatron_peft.benchmarks.subjects import Step
from megatron_peft.config import PeftConfig
from megatron_peft.parallel.layout import LinearLayout
from megatron_peft.runtime import cpu

NUM_TOKENS, NUM_FEATURES = 1024, 4096


@dataclass(frozen=True)
class Alone:
    """The only rank of a group."""

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return 1


def crossover_figures(num_turns: int) -> list[Figure]:
    """Forward and backward of a rotation of 4096 features and 1024 tokens, on both sides of `DENSE_UP_TO`."""
    torch.set_num_threads(1)
    cpu.install()
    return [_figure(size, num_turns) for size in (DENSE_UP_TO // 4, DENSE_UP_TO, 2 * DENSE_UP_TO, 4 * DENSE_UP_TO)]


def _figure(size: int, num_turns: int) -> Figure:
    seconds = take_turns(_steps(size), num_turns)
    ways = ("dense", "fourier") if size <= DENSE_UP_TO else ("fourier", "dense")
    note = "; ".join(f"{name} {median(spent):.3f} CPU s" for name, spent in seconds.items())
    name = f"groups of {size}: {ways[0]} / {ways[1]}"
    return Figure(name, median_ratio(*(seconds[way] for way in ways)), 1.0, "", note)


def _steps(size: int) -> dict[str, Step]:
    alone: Any = Alone()
    layout = LinearLayout("row", NUM_FEATURES, 64, alone)
    adapter = StructuredUrnn(layout, PeftConfig("urnn", urnn_block_size=size), "layer.adapter", 0, torch.float32)
    x = torch.randn(NUM_TOKENS, 1, NUM_FEATURES, requires_grad=True)
    upstream = torch.randn(NUM_TOKENS, 1, NUM_FEATURES)
    fixed = adapter.start, adapter.permutation
    return {
        "dense": lambda: rotate(x, adapter.changes()).backward(upstream),
        "fourier": lambda: rotate_by_fourier(x, adapter.theta, *fixed, slice(None), False).backward(upstream),
    }
