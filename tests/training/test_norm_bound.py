"""--lora-max-norm-ratio holds after every step, at every layout and for what the optimizer keeps in float32."""

from dataclasses import dataclass
from typing import Any

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
TP2 = {"parallel": {"tensor_model_parallel_size": 2}}
BF16 = {"model": {"bf16": True}}
DISTRIBUTED = {"optimizer": {"use_distributed_optimizer": True}}


def job_of(files, name: str, method: str, ratio: float | None = RATIO, **groups) -> Job:
    peft = {"lora_rank": 4, "lora_ga_batches": 1, "lora_max_norm_ratio": ratio, **METHODS[method]}
    return Job(name, *files, peft=peft, num_steps=3, training={"global_batch_size": 4}, **groups)


@dataclass(frozen=True)
class Bounded:
    """By layer: |dW| / |W0| after the last step. Losses by step; the largest |parameter - rounded float32 copy|."""

    ratios: dict[str, float]
    losses: list[float]
    master_gap: float


def run(jobs: list[Job]) -> dict[str, Bounded]:
    start_world()
    return {job.name: here(job) for job in jobs}


def here(job: Job) -> Bounded:
    """Every step of the job in the present world; or none, where it has a checkpoint to load."""
    with built(job) as (state, data):
        steps = iter(data.train)
        num_steps = 0 if load_checkpoint(state) else job.num_steps
        losses = [train_step(state, next(steps)).loss for _ in range(num_steps)]
        if state.config.checkpoint.save:
            state.position.iteration = num_steps
            draft_checkpoint(state).complete()
        gap = max(map(_gap, state.model_chunks[0].parameters()))  # before `_ratios` widens the parameters
        return Bounded(_ratios(state), losses, gap)


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
def on_two(files, tmp_path_factory):
    folder = str(tmp_path_factory.getbasetemp() / "bounded")
    jobs = [
        job_of(files, "lora TP2", "lora", **TP2),
        job_of(files, "original TP2", "original", **TP2, checkpoint={"save": folder}),
        job_of(files, "lora DP2 distributed bf16", "lora", **BF16, **DISTRIBUTED),
        job_of(files, "original DP2 distributed bf16", "original", **BF16, **DISTRIBUTED),
    ]
    return run_ranks(2, run, jobs)


@pytest.fixture(scope="module")
def alone_found(files):
    with one_rank(with_groups=False):
        return {
            **{name: here(job_of(files, name, name)) for name in METHODS},
            "free": here(job_of(files, "free", "lora", ratio=None)),
            "lora bf16": here(job_of(files, "lora bf16", "lora", **BF16)),
        }


@pytest.mark.parametrize("name", METHODS)
def test_no_change_is_above_its_limit_and_most_are_at_it(alone_found, name):
    ratios = np.array(list(alone_found[name].ratios.values()))
    assert ratios.max() <= RATIO * (1 + 1e-5)
    assert np.median(ratios) > 0.6 * RATIO


def test_without_the_flag_changes_are_larger(alone_found):
    assert min(alone_found["free"].ratios.values()) > 2 * RATIO


def test_the_float32_copy_is_scaled_with_the_parameter(alone_found):
    assert max(alone_found["lora bf16"].ratios.values()) <= RATIO * (1 + 2**-7)
    assert alone_found["lora bf16"].master_gap == 0


@pytest.mark.parametrize("name", ["lora", "original"])
def test_tensor_parallel_ranks_bound_the_whole_weight(on_two, alone_found, name):
    here, alone = on_two[0][f"{name} TP2"], alone_found[name]
    np.testing.assert_allclose(here.losses, alone.losses, rtol=1e-5)
    np.testing.assert_allclose(list(here.ratios.values()), list(alone.ratios.values()), rtol=1e-4)


def test_a_subtracted_start_is_the_same_when_its_checkpoint_is_opened_on_one_rank(on_two, files, tmp_path_factory):
    """Its norm would change if A0 or B0 were put together otherwise than A and B, gate and up of fc1 included."""
    with one_rank(with_groups=False):
        folder = str(tmp_path_factory.getbasetemp() / "bounded")
        opened = here(job_of(files, "opened", "original", checkpoint={"load": folder}))
    assert opened.losses == []
    for name, ratio in on_two[0]["original TP2"].ratios.items():
        assert opened.ratios[name] == pytest.approx(ratio, rel=1e-4), name


@pytest.mark.parametrize("name", ["lora", "original"])
def test_shards_of_a_distributed_optimizer_are_scaled(on_two, name):
    """An unscaled shard would come back with the next step's gather. The start's rounding is a large part of so small
    a change of `original`."""
    first, second = (rank[f"{name} DP2 distributed bf16"] for rank in on_two)
    assert max(first.ratios.values()) <= RATIO * (1.1 if name == "original" else 1 + 2**-7)
    assert first.ratios == second.ratios and first.losses == second.losses
