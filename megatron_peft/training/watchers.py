"""Watchers round the steps of a run: speed, timers, energy, the slowest rank; a profile of some steps, the allocator's
history, and garbage collection at agreed steps.

As in Megatron, --profile-step-start 4 --profile-step-end 6 profiles the fifth and the sixth step.
"""

import gc
import logging
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import Timers
from megatron.core.energy_monitor import EnergyMonitor
from megatron.core.utils import get_model_config

from megatron_peft.checkpoint.state import TrainingState
from megatron_peft.config import LoggingConfig, RunConfig
from megatron_peft.models.shape import ModelShape
from megatron_peft.runtime.launch import gather_over_world, largest_over_world
from megatron_peft.training.step import StepReport

logger = logging.getLogger(__name__)

Record = dict[str, Any]
MOST_ALLOCATIONS = 100_000  # Megatron's number


@dataclass
class Interval:
    """Time, tokens and losses since the last log line."""

    started_at: float = field(default_factory=time.perf_counter)
    num_steps: int = 0
    num_positions: int = 0
    num_pairs: int = 0
    sum_of_losses: float = 0.0

    def averages(self) -> Record:
        """Loss and seconds of a step, and tokens a second, over `interval_steps`."""
        seconds = time.perf_counter() - self.started_at
        return {
            "loss": self.sum_of_losses / self.num_steps,
            "interval_steps": self.num_steps,
            "step_seconds": seconds / self.num_steps,
            "tokens_per_second": self.num_positions / seconds,
        }


class Watchers:
    """All watchers of a run, made by `watched_steps`. What a run does between its steps stands inside `paused`."""

    def __init__(self, state: TrainingState) -> None:
        self.interval = Interval()  # since the last log line
        self.own_work = OwnWork(state.config.logging)  # the loop marks what is this rank's
        self._config, self._shape = state.config, state.shape
        self._timers, self._energy = StepTimers(state), Energy(state.config.logging)
        self.profile = ExitStack()
        settings = state.config.logging
        self._profiles = settings.profile and dist.get_rank() in settings.profile_ranks
        if self._profiles and not settings.use_pytorch_profiler and not torch.cuda.is_available():
            self._profiles = False
            logger.warning(
                "--profile marks steps for Nsight Systems, which needs a GPU, so nothing is profiled: add "
                "--use-pytorch-profiler for a trace by torch's profiler."
            )

    def before_step(self, iteration: int) -> None:
        """iteration: number of finished steps."""
        settings = self._config.logging
        if self._profiles and iteration == settings.profile_step_start:
            if settings.use_pytorch_profiler:
                folder, rank = settings.tensorboard_dir or ".", f"rank{dist.get_rank()}"
                handler = torch.profiler.tensorboard_trace_handler(folder, rank)
                self.profile.enter_context(torch.profiler.profile(record_shapes=True, on_trace_ready=handler))
            else:
                self.profile.enter_context(_nsight_range())

    def after_step(self, iteration: int, report: StepReport) -> None:
        """iteration: number of finished steps, with the one that has just ended."""
        if iteration >= self._config.logging.profile_step_end:
            self.profile.close()  # torch's trace is written here
        training = self._config.training
        if training.manual_gc and training.manual_gc_interval and iteration % training.manual_gc_interval == 0:
            gc.collect()
        self.interval.num_steps += 1
        self.interval.num_positions += report.num_positions
        self.interval.num_pairs += report.num_pairs
        self.interval.sum_of_losses += report.loss

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude a validation or a save from the time, the timers and the energy of steps."""
        began_at = time.perf_counter()
        with self._timers.paused(), self._energy.paused():
            yield
        self.interval.started_at += time.perf_counter() - began_at

    @contextmanager
    def around_validation(self) -> Iterator[None]:
        """Pause; --manual-gc collects what training left before it, and what validation left after it."""
        collects = self._config.training.manual_gc and self._config.training.manual_gc_eval
        if collects:
            gc.collect()
        with self.paused():
            yield
        if collects:
            gc.collect(generation=0)

    def speed(self, averages: Record) -> Record:
        """Fields of a log line, as the flags ask for them, beside the interval's `averages`. A collective."""
        interval = self.interval
        seconds = averages["step_seconds"] * interval.num_steps
        record = throughput(self._config, self._shape, interval.num_positions, interval.num_pairs, seconds)
        for watcher in (self._energy, self._timers, self.own_work):
            record |= watcher.record(interval.num_steps)
        return record


@contextmanager
def watched_steps(state: TrainingState) -> Iterator[Watchers]:
    """Watch the steps of a run until it ends, by an error too.

    All ranks wait for the one whose garbage Python collects: --manual-gc does it at the same step everywhere.
    """
    watchers = Watchers(state)
    with _memory_history(state.config.logging), ExitStack() as stack:
        stack.callback(watchers.profile.close)
        if state.config.training.manual_gc:
            gc.disable()
            stack.callback(gc.enable)
            gc.collect()
        yield watchers


@dataclass(frozen=True)
class ModelFlops:
    """Floating-point operations that training takes at least; a multiplication and an addition are two.

    With N weights in the products of the layers and the output layer, a token takes

        2 N forward + 2 N for gradients of activations [+ 2 N for gradients of weights, in full fine-tuning]

    and in each layer, for every position that it attends to (itself and earlier ones),

        4 h forward + 8 h backward, h = heads x features of a head.

    Recompute is not the model's and does not count, nor do adapters, norms and the vocabulary's padding.
    """

    per_token: int
    per_pair: int  # of positions, over all layers

    @classmethod
    def of(cls, shape: ModelShape, is_frozen: bool) -> "ModelFlops":
        heads = shape.num_attention_heads * shape.kv_channels
        groups = shape.num_query_groups * shape.kv_channels
        attention = shape.hidden_size * (heads + 2 * groups) + heads * shape.hidden_size
        mlp = shape.hidden_size * shape.ffn_hidden_size * (3 if shape.gated_linear_unit else 2)
        weights = shape.num_layers * (attention + mlp) + shape.hidden_size * shape.vocab_size
        return cls((4 if is_frozen else 6) * weights, 12 * heads * shape.num_layers)

    def count(self, num_positions: int, num_pairs: int) -> int:
        """The operations of so many positions that attend to so many pairs (`Microbatch.num_pairs`)."""
        return self.per_token * num_positions + self.per_pair * num_pairs


def throughput(config: RunConfig, shape: ModelShape, num_positions: int, num_pairs: int, seconds: float) -> Record:
    """--log-throughput and --peak-tflops, of all ranks' work in so many seconds; nothing without the flag."""
    if not config.logging.log_throughput:
        return {}
    gpu_seconds, peak = seconds * config.parallel.world_size, config.logging.peak_tflops
    flops = ModelFlops.of(shape, is_frozen=config.peft.trains_adapters).count(num_positions, num_pairs)
    tflops = flops / gpu_seconds / 1e12
    numbers = {"tokens_per_second_per_gpu": num_positions / gpu_seconds, "tflops_per_gpu": tflops}
    return numbers if peak is None else {**numbers, "mfu": tflops / peak}


# Each watcher has `record`: its fields of a log line, since the last call; a collective if its flag is given.


class StepTimers:
    """--timing-log-level: megatron-core's own timers in its schedules, gradient sums and optimizer.

    Each waits for the device when it starts and when it stops, and those of level 1 for all ranks when they start.
    """

    def __init__(self, state: TrainingState) -> None:
        level = int(state.config.logging.timing_log_level)
        self._timers: Any = Timers(level, "max") if level else None
        optimizers = getattr(state.optimizer, "chained_optimizers", [state.optimizer])
        self._configs: list[Any] = [optimizer.config for optimizer in optimizers if hasattr(optimizer, "config")]
        self._configs += [get_model_config(chunk) for chunk in state.model_chunks]
        self._names: list[str] = []  # of all ranks: those of different stages have different ones
        self._set(self._timers)

    def _set(self, timers: Any) -> None:
        for config in self._configs:
            config.timers = timers

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside is not timed."""
        self._set(None)
        yield
        self._set(self._timers)

    def record(self, num_steps: int) -> Record:
        """Seconds of each phase in a step, on its slowest rank."""
        if self._timers is None:
            return {}
        own = {name: self._timers(name).elapsed() for name in list(self._timers._timers)}
        while True:
            numbers = [float(not own.keys() <= {*self._names}), *(own.get(name, 0.0) for name in self._names)]
            device = torch.cuda.current_device()
            is_new, *largest = largest_over_world(torch.tensor(numbers, dtype=torch.float64, device=device))
            if not is_new:
                break
            self._names = sorted({name for names in gather_over_world([*own]) for name in names})
        seconds = {name: number / num_steps for name, number in zip(self._names, largest, strict=True)}
        return {"timer_seconds": seconds} if seconds else {}


class Energy:
    """--log-energy: what the GPUs of all ranks took, by NVIDIA's management library."""

    def __init__(self, settings: LoggingConfig) -> None:
        self._monitor = EnergyMonitor() if settings.log_energy and torch.cuda.is_available() else None
        if settings.log_energy and self._monitor is None:
            logger.warning("--log-energy reads NVIDIA's management library, and there is no GPU: nothing is recorded.")
        if self._monitor is not None:
            self._monitor.setup()
            self._monitor.resume()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside is not measured."""
        if self._monitor is not None:
            self._monitor.pause()
        yield
        if self._monitor is not None:
            self._monitor.resume()

    def record(self, num_steps: int) -> Record:
        """Joules of a step, over all GPUs. One host-device sync."""
        return {} if self._monitor is None else {"joules_per_step": self._monitor.lap() / num_steps}


class OwnWork:
    """--log-straggler: seconds of a rank's own work, which ends before it waits for other replicas or stages.

    As in Megatron-LM it is the time in which a batch is made, and forward passes; on a GPU these are read from events
    when the log line is due, so that no step waits. (megatron-core's StragglerDetector needs GPUs, waits for the device
    at each report and opens a port.) A tensor-parallel group works in step: one slow rank makes its whole group slow.
    """

    def __init__(self, settings: LoggingConfig) -> None:
        self._enabled, self._on_gpu = settings.log_straggler, torch.cuda.is_available()
        self._hosts = gather_over_world(os.uname().nodename) if self._enabled else []  # by rank
        self._host_seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def of_host(self) -> Iterator[None]:
        """What happens inside is this rank's own work, done by its host."""
        began_at = time.perf_counter()
        yield
        self._host_seconds += time.perf_counter() - began_at

    @contextmanager
    def of_device(self) -> Iterator[None]:
        """The same, done by its device."""
        if not self._enabled:
            yield
        elif not self._on_gpu:
            with self.of_host():
                yield
        else:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            yield
            end.record()
            self._events.append((start, end))

    def record(self, num_steps: int) -> Record:
        """The slowest rank and its seconds in a step, beside the median's."""
        if not self._enabled:
            return {}
        milliseconds = sum(start.elapsed_time(end) for start, end in self._events)
        own = (self._host_seconds + milliseconds / 1000) / num_steps
        self._host_seconds, self._events = 0.0, []
        by_rank = torch.zeros(len(self._hosts), dtype=torch.float64, device=torch.cuda.current_device())
        by_rank[dist.get_rank()] = own
        numbers = largest_over_world(by_rank)
        seconds, rank = max((seconds, rank) for rank, seconds in enumerate(numbers))
        slowest = {"rank": rank, "host": self._hosts[rank], "seconds": seconds, "median_seconds": median(numbers)}
        return {"slowest_rank": slowest}


@contextmanager
def _nsight_range() -> Iterator[None]:
    """What `nsys profile --capture-range=cudaProfilerApi` records."""
    runtime: Any = torch.cuda.cudart()
    torch.cuda.check_error(runtime.cudaProfilerStart())
    with torch.autograd.profiler.emit_nvtx(record_shapes=True):
        yield
    torch.cuda.check_error(runtime.cudaProfilerStop())


@contextmanager
def _memory_history(settings: LoggingConfig) -> Iterator[None]:
    """--record-memory-history on the ranks of --profile-ranks: the newest allocations, written when the run ends.

    If the file cannot be written, a warning is all, for the run matters more.
    """
    records = settings.record_memory_history and dist.get_rank() in settings.profile_ranks
    if records and not torch.cuda.is_available():
        logger.warning("--record-memory-history needs a GPU, whose allocator it records: nothing is recorded.")
    if not (records and torch.cuda.is_available()):
        yield
        return
    torch.cuda.memory._record_memory_history(max_entries=MOST_ALLOCATIONS)
    try:
        yield
    finally:
        path = Path(settings.memory_snapshot_path)
        path = path.with_name(f"{path.stem}.rank{dist.get_rank()}{path.suffix}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.cuda.memory._dump_snapshot(str(path))
        except OSError as error:
            logger.warning("--memory-snapshot-path %s cannot be written: %s", path, error.strerror)
        torch.cuda.memory._record_memory_history(enabled=None)
