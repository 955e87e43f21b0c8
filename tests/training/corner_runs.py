"""Runs in which ranks differ: stages without trainable parameters, tied embeddings, one rank with NaN or a signal.

Started on two ranks by test_corners.py.
"""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_peft.config import ParallelConfig
from megatron_peft.runtime.launch import start_model_parallel, start_world, stop_model_parallel
from megatron_peft.training.loop import train
from megatron_peft.training.step import NonFiniteError, train_step
from tests.training.layout_runs import Curve, Job, build, run_each
from tests.training.recorded_saves import RecordedSaves

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
    curves = run_each(corners.compared)
    errors = {job.name: _in_groups(job, _poisoned) for job in corners.poisoned}
    return Found(curves, errors, _in_groups(corners.signalled, _signalled))


def _in_groups(job: Job, action: Any) -> Any:
    config = job.config(dist.get_world_size())
    start_model_parallel(config.parallel, config.training.seed)
    try:
        return action(*build(config))
    finally:
        stop_model_parallel()


def _poisoned(state: Any, data: Any) -> str:
    def spoil(module: Any, inputs: Any, losses: torch.Tensor) -> torch.Tensor:
        return losses * torch.nan

    if dist.get_rank() == BAD_RANK:
        state.model_chunks[0].module.register_forward_hook(spoil)
    before = [parameter.detach().clone() for parameter in state.model_chunks[0].parameters()]
    try:
        train_step(state, next(iter(data.train)))
    except NonFiniteError as error:
        unchanged = all(map(torch.equal, before, state.model_chunks[0].parameters()))
        return str(error) if unchanged else "parameters were changed"
    return "no error"


def _signalled(state: Any, data: Any) -> tuple[str, list[int]]:
    saver = RecordedSaves()
    step_at = data.train.step_at

    def killing_step_at(first: int) -> Any:
        if first == state.config.global_batch_size and dist.get_rank() == BAD_RANK:
            os.kill(os.getpid(), signal.SIGUSR1)
        return step_at(first)

    data.train.step_at = killing_step_at
    return train(state, data, saver), saver.saved
