"""What a log line says of speed: model FLOPs, the timers of megatron-core's schedules and optimizer, the slowest
rank, energy."""

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from megatron.core import Timers
from megatron.core.energy_monitor import EnergyMonitor
from megatron.core.utils import get_model_config

from megatron_peft.config import LoggingConfig, RunConfig
from megatron_peft.models.shape import ModelShape
from megatron_peft.runtime.launch import gather_over_world
from megatron_peft.training.state import TrainingState

logger = logging.getLogger(__name__)

Record = dict[str, Any]


@dataclass(frozen=True)
class ModelFlops:
    """Floating-point operations that training takes at least; a multiplication and an addition are two.

    With N weights in the products of the layers and the output layer, a token takes

        2 N forward + 2 N for gradients of activations [+ 2 N for gradients of weights, in full fine-tuning]

    and in each layer, for every position that it attends to (itself and earlier ones),

        4 h forward + 8 h backward, h = heads x features of a head.

    Recompute is not the model's and does not count, nor do adapters, norms and the vocabulary's padding.

    Args:
        per_token: of a position.
        per_pair: of a pair of positions, over all layers.
    """

    per_token: int
    per_pair: int

    @classmethod
    def of(cls, shape: ModelShape, is_frozen: bool) -> "ModelFlops":
        """Of a model whose own weights are `is_frozen`, or are trained."""
        heads = shape.num_attention_heads * shape.kv_channels
        groups = shape.num_query_groups * shape.kv_channels
        attention = shape.hidden_size * (heads + 2 * groups) + heads * shape.hidden_size
        mlp = shape.hidden_size * shape.ffn_hidden_size * (3 if shape.gated_linear_unit else 2)
        weights = shape.num_layers * (attention + mlp) + shape.hidden_size * shape.vocab_size
        return cls((4 if is_frozen else 6) * weights, 12 * heads * shape.num_layers)

    def count(self, num_positions: int, num_pairs: int) -> int:
        """Of so many positions that attend to so many pairs (`Microbatch.num_pairs`)."""
        return self.per_token * num_positions + self.per_pair * num_pairs


class Throughput:
    """--log-throughput and --peak-tflops."""

    def __init__(self, config: RunConfig, shape: ModelShape) -> None:
        self._settings = config.logging
        self._num_gpus = config.parallel.world_size
        self._flops = ModelFlops.of(shape, is_frozen=config.peft.trains_adapters)

    def numbers(self, num_positions: int, num_pairs: int, seconds: float) -> Record:
        """Of all ranks' work in so many seconds; nothing without the flag."""
        if not self._settings.log_throughput:
            return {}
        gpu_seconds, peak = seconds * self._num_gpus, self._settings.peak_tflops
        tflops = self._flops.count(num_positions, num_pairs) / gpu_seconds / 1e12
        found = {"tokens_per_second_per_gpu": num_positions / gpu_seconds, "tflops_per_gpu": tflops}
        return found if peak is None else {**found, "mfu": tflops / peak}


class StepTimers:
    """--timing-log-level: megatron-core's own timers in its schedules, gradient sums and optimizer.

    Each waits for the device when it starts and when it stops, and those of level 1 for all ranks when they start.
    """

    def __init__(self, state: TrainingState) -> None:
        level = int(state.config.logging.timing_log_level)
        self._timers: Any = Timers(level, "max") if level else None
        self._configs: list[Any] = [get_model_config(chunk) for chunk in state.model_chunks]
        optimizers = getattr(state.optimizer, "chained_optimizers", [state.optimizer])
        self._configs += [one.config for one in optimizers if hasattr(one, "config")]
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

    def seconds(self, num_steps: int) -> dict[str, float]:
        """Seconds of each phase in a step, on its slowest rank, since the last call. A collective with a level."""
        if self._timers is None:
            return {}
        names = list(self._timers._timers)  # ranks of different stages have different ones
        gathered = gather_over_world({name: self._timers(name).elapsed() for name in names})
        every = sorted({name for found in gathered for name in found})
        return {name: max(found.get(name, 0.0) for found in gathered) / num_steps for name in every}


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

    def joules(self, num_steps: int) -> Record:
        """Joules of a step since the last call, over all GPUs. A collective with the flag, and one host-device sync."""
        return {} if self._monitor is None else {"joules_per_step": self._monitor.lap() / num_steps}


class OwnWork:
    """--log-straggler: seconds of a rank's own work, which ends before it waits for other replicas or stages.

    Megatron-LM measures the same: the time in which a batch is made, and forward passes. On a GPU these are read from
    events when the log line is due, so that no step waits for them. A tensor-parallel group works in step: one slow
    rank makes its whole group slow.
    """

    def __init__(self, settings: LoggingConfig) -> None:
        self._enabled, self._on_gpu = settings.log_straggler, torch.cuda.is_available()
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

    def slowest(self, num_steps: int) -> Record:
        """The slowest rank and its seconds in a step since the last call, beside the median's. A collective."""
        if not self._enabled:
            return {}
        milliseconds = sum(start.elapsed_time(end) for start, end in self._events)
        own = (self._host_seconds + milliseconds / 1000) / num_steps
        self._host_seconds, self._events = 0.0, []
        found = gather_over_world((own, os.uname().nodename))
        seconds, rank = max((seconds, rank) for rank, (seconds, _) in enumerate(found))
        typical = median(seconds for seconds, _ in found)
        return {"rank": rank, "host": found[rank][1], "seconds": seconds, "median_seconds": typical}


class Speed:
    """All of it, for a run's log."""

    def __init__(self, state: TrainingState) -> None:
        self.own_work = OwnWork(state.config.logging)
        self._throughput = Throughput(state.config, state.shape)
        self._timers = StepTimers(state)
        self._energy = Energy(state.config.logging)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """For what is not a step: validation and saves."""
        with self._timers.paused(), self._energy.paused():
            yield

    def record(self, num_steps: int, num_positions: int, num_pairs: int, seconds: float) -> Record:
        """Fields of the record of an interval, as the flags ask for them. A collective."""
        timers, slowest = self._timers.seconds(num_steps), self.own_work.slowest(num_steps)
        return {
            **self._throughput.numbers(num_positions, num_pairs, seconds),
            **self._energy.joules(num_steps),
            **({"timer_seconds": timers} if timers else {}),
            **({"slowest_rank": slowest} if slowest else {}),
        }
