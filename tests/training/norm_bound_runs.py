"""Norms of the low-rank changes after bounded steps, at several layouts in one world; started by test_norm_bound.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_peft.adapters.attach import linear_layers
from megatron_peft.adapters.low_rank import low_rank_part
from megatron_peft.checkpoint.load import load_checkpoint
from megatron_peft.checkpoint.save import save_checkpoint
from megatron_peft.config import ParallelConfig
from megatron_peft.runtime.launch import start_world
from megatron_peft.training.step import train_step
from tests.training.layout_runs import Job, built


@dataclass(frozen=True)
class Bounded:
    """By layer: |dW| / |W0| after the last step. Losses by step; the largest |parameter - rounded float32 copy|."""

    ratios: dict[str, float]
    losses: list[float]
    master_gap: float


def run(jobs: list[Job]) -> dict[str, Bounded]:
    start_world(ParallelConfig())
    return {job.name: here(job) for job in jobs}


def here(job: Job) -> Bounded:
    """Every step of the job in the present world; or none, where it has a checkpoint to load."""
    with built(job) as (state, data):
        steps = iter(data.train)
        num_steps = 0 if load_checkpoint(state) else job.num_steps
        losses = [train_step(state, next(steps)).loss for _ in range(num_steps)]
        if state.config.checkpoint.save:
            state.position.iteration = num_steps
            save_checkpoint(state)
        gap = _master_gap(state)
        return Bounded(_ratios(state), losses, gap)


def _ratios(state: Any) -> dict[str, float]:
    group: Any = parallel_state.get_tensor_model_parallel_group()
    found = {}
    for target in (target for chunk in state.model_chunks for target in linear_layers(chunk)):
        low_rank = low_rank_part(target.module.adapter)
        assert low_rank is not None
        with torch.no_grad():
            low_rank.double()  # a difference of bfloat16 products is below their rounding
            dense = low_rank.delta_weight(), target.module.weight.double()
        squares = torch.stack([matrix.square().sum() for matrix in dense])
        dist.all_reduce(squares, group=group)
        found[target.name] = float((squares[0] / squares[1]).sqrt())
    return found


def _master_gap(state: Any) -> float:
    """Of what this rank's optimizer holds whole or in part; read before `_ratios` widens the parameters."""
    return max((gap for chunk in state.model_chunks for gap in map(_gap, chunk.parameters())), default=0.0)


def _gap(parameter: Any) -> float:
    master = getattr(parameter, "main_param", None)
    if master is None or master.numel() != parameter.numel():
        return 0.0
    return float((parameter.float() - master.to(torch.bfloat16).float().view_as(parameter)).abs().max())
