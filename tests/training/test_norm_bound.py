"""--lora-max-norm-ratio holds after every step, in a checkpoint and for what the optimizer keeps in float32.

`test_layout_small.py` has it at several layouts.
"""

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_peft.adapters.attach import linear_layers
from megatron_peft.adapters.low_rank import low_rank_part
from megatron_peft.checkpoint.load import load_checkpoint
from megatron_peft.checkpoint.save import draft_checkpoint
from megatron_peft.runtime.launch import start_world
from megatron_peft.training.step import train_step
from tests.one_rank import one_rank
from tests.ranks import run_ranks
from tests.training.layout_runs import Job, built

RATIO = 0.01
METHODS = {
    "lora": {"method": "lora"},
    "original": {"method": "lora-ga", "lora_ga_init": "original"},
    "hybrid": {"method": "hybrid", "boft_block_size": 2, "boft_factors": 2},
}
BF16 = {"model": {"bf16": True}}
SHARDED = {**BF16, "optimizer": {"use_distributed_optimizer": True}}


class Bounded(NamedTuple):
    """By layer: |dW| / |W0| after the last step. Losses by step; the largest |parameter - rounded float32 copy|."""

    ratios: dict[str, float]
    losses: list[float]
    master_gap: float


def run(jobs: list[Job]) -> list[Bounded]:
    """Every step of each job in the present world; or none, where it has a checkpoint to load."""
    found = []
    for job in jobs:
        with built(job) as (state, data):
            steps = iter(data.train)
            num_steps = 0 if load_checkpoint(state) else job.num_steps
            losses = [train_step(state, next(steps)).loss for _ in range(num_steps)]
            if state.config.checkpoint.save:
                state.position.iteration = num_steps
                draft_checkpoint(state).complete()
            gap = max(map(_gap, state.model_chunks[0].parameters()))  # before `_ratios` widens the parameters
            found.append(Bounded(_ratios(state), losses, gap))
    return found


def on_ranks(jobs: list[Job]) -> list[Bounded]:
    start_world()
    return run(jobs)


def _ratios(state: Any) -> dict[str, float]:
    group: Any = parallel_state.get_tensor_model_parallel_group()
    found = {}
    for target in linear_layers(state.model_chunks[0]):
        low_rank = low_rank_part(target.module.adapter)
        with torch.no_grad():
            low_rank.double()  # a difference of bfloat16 products is below their rounding
            dense = low_rank.delta_weight(), target.module.weight.double()
        squares = torch.stack([matrix.square().sum() for matrix in dense])
        dist.all_reduce(squares, group=group)
        found[target.name] = float((squares[0] / squares[1]).sqrt())
    return found


def _gap(parameter: Any) -> float:
    """From the rounded float32 copy, where this rank holds all of it."""
    master = getattr(parameter, "main_param", None)
    if master is None or master.numel() != parameter.numel():
        return 0.0
    return float((parameter.float() - master.to(torch.bfloat16).float().view_as(parameter)).abs().max())


@pytest.fixture(scope="module")
def bounded(files):
    """Jobs of three steps, run on this process or on two ranks: by rank, what each has found of each."""

    def job(method: str, ratio: float | None = RATIO, **groups) -> Job:
        peft = {"lora_rank": 4, "lora_ga_batches": 1, "lora_max_norm_ratio": ratio, **METHODS[method]}
        return Job(method, *files, peft=peft, num_steps=3, training={"global_batch_size": 4}, **groups)

    def found(num_ranks: int, *asked: dict) -> list[list[Bounded]]:
        jobs = [job(**settings) for settings in asked]
        if num_ranks > 1:
            return run_ranks(num_ranks, on_ranks, jobs)
        with one_rank(with_groups=False):
            return [run(jobs)]

    return found


@pytest.mark.parametrize("name", METHODS)
def test_no_change_is_above_its_limit_and_most_are_at_it(bounded, name):
    ((found,),) = bounded(1, {"method": name})
    ratios = np.array(list(found.ratios.values()))
    assert ratios.max() <= RATIO * (1 + 1e-5)
    assert np.median(ratios) > 0.6 * RATIO


def test_the_float32_copy_is_scaled_with_the_parameter(bounded):
    ((free, found),) = bounded(1, {"method": "lora", "ratio": None}, {"method": "lora", **BF16})
    assert min(free.ratios.values()) > 2 * RATIO, "without the flag changes are larger"
    assert max(found.ratios.values()) <= RATIO * (1 + 2**-7)
    assert found.master_gap == 0


def test_ranks_scale_a_subtracted_start_and_their_shards_and_save_what_one_rank_opens(bounded, tmp_path):
    """Its norm would change if A0 or B0 were put together otherwise than A and B, gate and up of fc1 included. An
    unscaled shard would come back with the next step's gather; in bfloat16 the start's rounding is a large part of so
    small a change of `original`."""
    whole = {"parallel": {"tensor_model_parallel_size": 2}, "checkpoint": {"save": str(tmp_path)}}
    asked = {"method": "original", **whole}, {"method": "lora", **SHARDED}, {"method": "original", **SHARDED}
    (saved, *first), (_, *second) = bounded(2, *asked)
    for one, other, limit in zip(first, second, (1 + 2**-7, 1.1), strict=True):
        assert max(one.ratios.values()) <= RATIO * limit
        assert one.ratios == other.ratios and one.losses == other.losses
    ((opened,),) = bounded(1, {"method": "original", "checkpoint": {"load": str(tmp_path)}})
    assert opened.losses == [] and opened.ratios == pytest.approx(saved.ratios, rel=1e-4)
