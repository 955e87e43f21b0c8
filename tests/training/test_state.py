"""What a run is built from; and whole gradients, from whatever stretches of them a rank holds."""

from __future__ import annotations

import pytest
import torch

from megatron_peft.config import ConfigurationError
from megatron_peft.training.shards import GradientShards
from megatron_peft.training.step import train_step


def test_the_pretrained_weights_are_in_place_and_frozen(start):
    lora, full = start()[0], start(peft={"method": "full"})[0]
    loaded = dict(lora.model_chunks[0].named_parameters())
    for name, parameter in full.model_chunks[0].named_parameters():
        assert torch.equal(loaded[name], parameter), name
        assert parameter.requires_grad and not loaded[name].requires_grad
    assert loaded["module.embedding.word_embeddings.weight"].std() > 0.01


def test_the_start_says_what_was_read_and_what_will_be_trained(start, capsys):
    start()
    said = capsys.readouterr().out
    assert "MiB of weights on this rank" in said
    assert "--peft-method lora: 8 layers: linear_fc1 (2), linear_fc2 (2), linear_proj (2), linear_qkv (2)" in said


@pytest.mark.parametrize(
    ("peft", "message"),
    [
        ({"target_modules": ("lm_head",)}, "--peft-target-modules lm_head matches no linear layer"),
        ({"lora_rank": 97}, "--lora-rank 97 is above 96"),
    ],
)
def test_an_adapter_that_fits_no_layer_is_refused(start, peft, message):
    with pytest.raises(ConfigurationError, match=message):
        start(peft=peft)


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
