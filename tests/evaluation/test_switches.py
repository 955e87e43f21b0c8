"""Switches go back to where they were, also after an error; that they matter is shown by test_generation.py."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from megatron_peft.evaluation.switches import SEQUENCE_PARALLEL_SWITCHES, inference


class Config:
    sequence_parallel = True


def _chunk(config):
    chunk, norm = nn.Module(), nn.Module()
    chunk.norm, norm.config, norm.sequence_parallel = norm, config, True
    chunk.scatter_to_sequence_parallel = True
    chunk.reduce_scatter_embeddings = False
    return chunk


def test_everything_is_off_inside_and_as_it_was_afterwards():
    config = Config()
    training, evaluated = _chunk(config), _chunk(config).eval()
    with pytest.raises(KeyError), inference([training, evaluated]):
        owners = [owner for chunk in (training, evaluated) for owner in (chunk, chunk.norm, config)]
        assert not any(getattr(owner, name, False) for owner in owners for name in SEQUENCE_PARALLEL_SWITCHES)
        assert not training.training and not torch.is_grad_enabled()
        raise KeyError
    assert config.sequence_parallel and training.norm.sequence_parallel and training.scatter_to_sequence_parallel
    assert training.training and not evaluated.training and torch.is_grad_enabled()
    assert not training.reduce_scatter_embeddings
