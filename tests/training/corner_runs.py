"""Runs in which ranks differ: stages without trainable parameters, tied embeddings, one rank with NaN or a signal.

Started on two ranks by test_corners.py.
"""

from __future__ import annotations

import signal
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_peft.config import ParallelConfig
from megatron_peft.runtime.launch import start_world
from megatron_peft.training.loop import train
from megatron_peft.training.step import NonFiniteError, train_step
from tests.training.layout_runs import Curve, Job, built, run_each
from tests.training.recorded_saves import RecordedSaves, signal_at

BAD_RANK = 1


@dataclass(frozen=True)
class Corners:
    """Jobs whose curves are compared; jobs in which BAD_RANK's last loss is NaN; a job that it is asked to stop."""

    compared: list[Job]
    poisoned: list[Job]
    signalled: Job


@dataclass(frozen=True)
class Found:
    curves: dict[str, Curve]
    errors: dict[str, str]
    stopped: tuple[str, list[int]]  # why the run ended, iterations at which it saved


def run(corners: Corners) -> Found:
    start_world(ParallelConfig())
    errors = {job.name: _poisoned(job) for job in corners.poisoned}
    return Found(run_each(corners.compared), errors, _signalled(corners.signalled))


def _poisoned(job: Job) -> str:
    def spoil(module: Any, inputs: Any, losses: torch.Tensor) -> torch.Tensor:
        return losses * torch.nan

    with built(job) as (state, data):
        if dist.get_rank() == BAD_RANK:
            state.model_chunks[0].module.register_forward_hook(spoil)
        before = [parameter.detach().clone() for parameter in state.model_chunks[0].parameters()]
        try:
            train_step(state, next(iter(data.train)))
        except NonFiniteError as error:
            unchanged = all(map(torch.equal, before, state.model_chunks[0].parameters()))
            return str(error) if unchanged else "parameters were changed"
    return "no error"


def _signalled(job: Job) -> tuple[str, list[int]]:
    saver = RecordedSaves()
    with built(job) as (state, data):
        if dist.get_rank() == BAD_RANK:
            signal_at(data, state.config.global_batch_size, signal.SIGUSR1)
        return train(state, data, saver), saver.saved
