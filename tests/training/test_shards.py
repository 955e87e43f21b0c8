"""The whole gradients, from whatever stretches of them a rank holds."""

from __future__ import annotations

import pytest
import torch

from megatron_peft.training.shards import GradientShards
from megatron_peft.training.step import train_step


@pytest.mark.parametrize("sharded", [False, True])
def test_own_stretches_make_the_whole(start, sharded):
    state, data = start(optimizer={"use_distributed_optimizer": sharded, "clip_grad": 0.0})
    train_step(state, next(iter(data.train)))
    shards = GradientShards(state.optimizer)
    parameters = [p for p in state.model_chunks[0].parameters() if p.requires_grad]
    assert shards.is_sharded is sharded and len(parameters) == 16
    for parameter, whole in zip(parameters, shards.whole(parameters), strict=True):
        assert torch.equal(whole, parameter.main_grad.float()) and whole.data_ptr() != parameter.main_grad.data_ptr()
        assert torch.equal(shards.own(parameter), parameter.main_grad.flatten())


def test_a_parameter_of_another_ranks_shard_has_no_stretch(start):
    state, _ = start(optimizer={"use_distributed_optimizer": True})
    shards = GradientShards(state.optimizer)
    elsewhere = torch.nn.Parameter(torch.zeros(3))
    elsewhere.main_grad = torch.ones(3)
    assert shards.own(elsewhere).numel() == 0
    assert torch.equal(shards.whole([elsewhere])[0], torch.zeros(3))
