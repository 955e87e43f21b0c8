"""What a step's time means for a run: tokens a second, TFLOP/s and MFU, hours for a number of tokens."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

from rich.table import Column, Table

from megatron_peft.config import RunConfig
from megatron_peft.models.shape import ModelShape
from megatron_peft.plan.cluster import Cluster
from megatron_peft.plan.timing import StepTime
from megatron_peft.training.watchers import ModelFlops

ERRORS = Path(__file__).parent / "published_errors.json"
ONLY_RANKS = "A plan ranks the layouts of a run on a cluster; its seconds are no promise."


@dataclass(frozen=True)
class Accuracy:
    """How far off plans of published runs were: planned over published seconds, less 1."""

    errors: tuple[float, ...]
    elsewhere: tuple[float, ...] = ()  # layouts of a run on a network that is not like those of clusters here

    @classmethod
    @cache
    def reported(cls) -> "Accuracy":
        """The errors of the runs that had no part in the constants (`tools/published.py`)."""
        return cls(*(tuple(errors.values()) for errors in json.loads(ERRORS.read_text(encoding="utf-8")).values()))

    @property
    def median(self) -> float:
        return median(map(abs, self.errors))

    @property
    def worst(self) -> float:
        return max(map(abs, self.errors))

    def around(self, seconds: float) -> tuple[float, float]:
        """What a run may take of which a plan says `seconds`, if it is as far off as the outermost of these."""
        return seconds / (1 + max(*self.errors, 0.0)), seconds / (1 + min(*self.errors, 0.0))

    def __str__(self) -> str:
        sizes = f"{self.median:.0%} in the median, {self.worst:.0%} at most"
        told = f"{len(self.errors)} published runs were off by {sizes}"
        if not self.elsewhere:
            return told
        other = Accuracy(self.elsewhere)
        return (
            f"{told}; {len(other.errors)} layouts on another network by {other.median:.0%}, {other.worst:.0%} at most"
        )


@dataclass(frozen=True)
class PlannedSpeed:
    """A step's time, and what a run of such steps gets done. Every sequence is taken to be full."""

    time: StepTime
    tokens: int  # of a step, over all replicas
    flops: int  # of a step, as --log-throughput counts them (`ModelFlops`)
    num_gpus: int
    peak_tflops: float  # of a GPU in the run's precision
    num_layers: int

    @classmethod
    def of(cls, run: RunConfig, shape: ModelShape, cluster: Cluster, time: StepTime) -> "PlannedSpeed":
        length, rows = run.data.seq_length, run.global_batch_size
        model = ModelFlops.of(shape, is_frozen=run.peft.trains_adapters)
        flops = model.count(rows * length, rows * length * (length + 1) // 2)
        peak = cluster.bf16_tflops if run.model.bf16 else cluster.fp32_tflops
        return cls(time, rows * length, flops, run.parallel.world_size, peak, shape.num_layers)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.time.seconds

    @property
    def tflops_per_gpu(self) -> float:  # of the model: recompute does not count
        return self.flops / self.time.seconds / self.num_gpus / 1e12

    @property
    def mfu(self) -> float:
        return self.tflops_per_gpu / self.peak_tflops

    def hours(self, num_tokens: float) -> float:
        return num_tokens / self.tokens_per_second / 3600

    def summary(self) -> str:
        """Seconds of a step, and how far they can be relied on."""
        accuracy = Accuracy.reported()
        low, high = accuracy.around(self.time.seconds)
        return f"time: {self.time.seconds:.3g} s a step ({low:.3g} to {high:.3g}: {accuracy}). {ONLY_RANKS}"

    def as_dict(self, num_tokens: float = 1e8) -> dict[str, Any]:
        accuracy = Accuracy.reported()
        errors = {"number": len(accuracy.errors), "median_error": accuracy.median, "worst_error": accuracy.worst}
        return {
            "time": self.time.as_dict(),
            "seconds_range": accuracy.around(self.time.seconds),
            "published_runs": errors,
            "tokens_per_step": self.tokens,
            **{name: getattr(self, name) for name in ("tokens_per_second", "tflops_per_gpu", "mfu")},
            "tokens_of_the_run": num_tokens,
            "hours": self.hours(num_tokens),
        }


def time_table(speed: PlannedSpeed, num_tokens: float | None = None) -> Table:
    """Where a step's time goes, and the hours of `num_tokens`, or of 100 million, as a table for the terminal."""
    numbers = Column(justify="right"), Column(justify="right")
    table = Table("", *numbers, title="Time of a step (estimated)", show_header=False)
    seconds = speed.time.seconds
    for kind, spent in speed.time.by_kind.items():
        if spent > 0.0005 * seconds:
            table.add_row(kind, f"{spent:.3f} s", f"{spent / seconds:.1%}")
    table.add_row("step", f"{seconds:.3f} s", "100%", end_section=True)
    table.add_row("tokens a second", f"{speed.tokens_per_second:,.0f}", "")
    table.add_row("TFLOP/s a GPU, MFU", f"{speed.tflops_per_gpu:.0f}", f"{speed.mfu:.1%}")
    tokens = 1e8 if num_tokens is None else num_tokens
    table.add_row(f"hours for {tokens / 1e6:,.0f} million tokens", f"{speed.hours(tokens):,.1f}", "")
    return table
