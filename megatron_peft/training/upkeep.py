"""What a loop does between steps beside training: garbage collection at agreed steps, and profiling of some steps.

Flags and meanings are Megatron's: step numbers count finished steps, so --profile-step-start 4 --profile-step-end 6
profiles the fifth and the sixth step.
"""

import gc
import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist

from megatron_peft.config import LoggingConfig, RunConfig

logger = logging.getLogger(__name__)


class Upkeep:
    """A context manager around the steps of a run.

    Python's collector runs when it likes, at other steps on each rank, and all ranks wait for the one that collects:
    --manual-gc turns it off and collects at the same step everywhere.
    """

    def __init__(self, config: RunConfig) -> None:
        self._training = config.training
        self._profile = ProfiledSteps(config.logging)

    def __enter__(self) -> "Upkeep":
        if self._training.manual_gc:
            gc.disable()
            gc.collect()
        return self

    def __exit__(self, *_: object) -> None:
        self._profile.stop()
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
