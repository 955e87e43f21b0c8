"""Every generator of a rank is written and set again."""

from __future__ import annotations

import random

import numpy as np
import torch
from megatron.core import parallel_state, tensor_parallel

from megatron_peft.checkpoint.random_state import random_targets, random_tensors, restore_random


def draws() -> list[float]:
    with tensor_parallel.get_cuda_rng_tracker().fork():
        tracked = torch.rand(1).item()
    return [random.gauss(0, 1), float(np.random.normal()), torch.rand(1).item(), tracked]


def test_the_same_numbers_come_again(alone):
    draws()  # an odd number of normal draws: a second one waits in Python's and in numpy's generator
    stored = {tensor.key: tensor.data.clone() for tensor in random_tensors()}
    first = draws()
    targets = random_targets({key: tuple(data.shape) for key, data in stored.items()})
    for target in targets:
        target.data.copy_(stored[target.key])
    restore_random(targets)
    assert draws() == first


def test_another_layout_has_no_generators_here(alone, monkeypatch):
    stored = {tensor.key: tuple(tensor.data.shape) for tensor in random_tensors()}
    assert random_targets(stored)
    monkeypatch.setattr(parallel_state, "get_tensor_model_parallel_world_size", lambda: 2)
    assert random_targets(stored) == []
