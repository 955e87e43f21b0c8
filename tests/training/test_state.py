"""What a run is built from; test_build of the data is elsewhere."""

from __future__ import annotations

import pytest
import torch

from megatron_peft.config import ConfigurationError
from megatron_peft.training.state import Position


def test_a_run_begins_at_nothing():
    assert Position() == Position(iteration=0, consumed_samples=0, consumed_tokens=0)


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


def test_a_wrong_target_is_refused(start):
    with pytest.raises(ConfigurationError, match="--peft-target-modules lm_head matches no linear layer"):
        start(peft={"target_modules": ("lm_head",)})


def test_a_rank_above_a_layers_size_is_refused(start):
    with pytest.raises(ConfigurationError, match="--lora-rank 97 is above 96"):
        start(peft={"lora_rank": 97})
