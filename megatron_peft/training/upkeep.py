"""What a loop does beside training: garbage collection at agreed steps, profiling of some steps, memory's history.

Flags and meanings are Megatron's: step numbers count finished steps, so --profile-step-start 4 --profile-step-end 6
profiles the fifth and the sixth step.
"""

import gc
import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_peft.config import LoggingConfig, RunConfig

logger = logging.getLogger(__name__)

MOST_ALLOCATIONS = 100_000  # Megatron's number


class Upkeep:
    """A context manager around the steps of a run.

    Python's collector runs when it likes, at other steps on each rank, and all ranks wait for the one that collects:
    --manual-gc turns it off and collects at the same step everywhere.
    """

    def __init__(self, config: RunConfig) -> None:
        self._training = config.training
        self._profile = ProfiledSteps(config.logging)
        self._memory = MemoryHistory(config.logging)

    def __enter__(self) -> "Upkeep":
        self._memory.start()
        if self._training.manual_gc:
            gc.disable()
            gc.collect()
        return self

    def __exit__(self, *_: object) -> None:
        self._profile.stop()
        self._memory.write()
        if self._training.manual_gc:
            gc.enable()

    def before_step(self, iteration: int) -> None:
        """iteration: number of finished steps."""
        self._profile.before_step(iteration)

    def after_step(self, iteration: int) -> None:
        """iteration: number of finished steps, with the one that has just ended."""
        self._profile.after_step(iteration)
        interval = self._training.manual_gc_interval
        if self._training.manual_gc and interval and iteration % interval == 0:
            gc.collect()

    @contextmanager
    def around_validation(self) -> Iterator[None]:
        """Collect what training left before it, and what validation left after it."""
        collects = self._training.manual_gc and self._training.manual_gc_eval
        if collects:
            gc.collect()
        yield
        if collects:
            gc.collect(generation=0)


class ProfiledSteps:
    """The steps of --profile on the ranks of --profile-ranks."""

    def __init__(self, settings: LoggingConfig) -> None:
        self._settings = settings
        self._is_on = settings.profile and dist.get_rank() in settings.profile_ranks
        self._running: ExitStack | None = None
        if self._is_on and not settings.use_pytorch_profiler and not torch.cuda.is_available():
            self._is_on = False
            logger.warning(
                "--profile marks steps for Nsight Systems, which needs a GPU, so nothing is profiled: add "
                "--use-pytorch-profiler for a trace by torch's profiler."
            )

    def before_step(self, iteration: int) -> None:
        if self._is_on and self._running is None and iteration == self._settings.profile_step_start:
            self._running = ExitStack()
            self._running.enter_context(
                _torch_trace(self._settings) if self._settings.use_pytorch_profiler else _nsight_range()
            )

    def after_step(self, iteration: int) -> None:
        if iteration >= self._settings.profile_step_end:
            self.stop()

    def stop(self) -> None:
        """End what is being profiled; the trace is written here."""
        if self._running is not None:
            self._running.close()
            self._running = None


def _torch_trace(settings: LoggingConfig) -> torch.profiler.profile:
    handler = torch.profiler.tensorboard_trace_handler(settings.tensorboard_dir or ".", f"rank{dist.get_rank()}")
    return torch.profiler.profile(record_shapes=True, on_trace_ready=handler)


@contextmanager
def _nsight_range() -> Iterator[None]:
    """What `nsys profile --capture-range=cudaProfilerApi` records."""
    runtime: Any = torch.cuda.cudart()
    torch.cuda.check_error(runtime.cudaProfilerStart())
    with torch.autograd.profiler.emit_nvtx(record_shapes=True):
        yield
    torch.cuda.check_error(runtime.cudaProfilerStop())


class MemoryHistory:
    """--record-memory-history on the ranks of --profile-ranks, written when the run ends, by an error too."""

    def __init__(self, settings: LoggingConfig) -> None:
        path = Path(settings.memory_snapshot_path)
        self._path = path.with_name(f"{path.stem}.rank{dist.get_rank()}{path.suffix}")
        self._is_on = settings.record_memory_history and dist.get_rank() in settings.profile_ranks
        if self._is_on and not torch.cuda.is_available():
            self._is_on = False
            logger.warning("--record-memory-history needs a GPU, whose allocator it records: nothing is recorded.")

    def start(self) -> None:
        """Record allocations from here on, the newest of them."""
        if self._is_on:
            torch.cuda.memory._record_memory_history(max_entries=MOST_ALLOCATIONS)

    def write(self) -> None:
        """Write the file; without one, a warning is all, for the run matters more."""
        if not self._is_on:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            torch.cuda.memory._dump_snapshot(str(self._path))
        except OSError as error:
            logger.warning("--memory-snapshot-path %s cannot be written: %s", self._path, error.strerror)
        torch.cuda.memory._record_memory_history(enabled=None)
