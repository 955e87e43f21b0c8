"""The state of a run is independent of the layout, converts between precisions, and includes every generator."""

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.core import parallel_state, tensor_parallel

from megatron_peft.checkpoint.state import random_targets, random_tensors, restore_random, slices_of_range
from tests.checkpoint.rank_checks import RESHARDED, SLOWLY_RESHARDED


@pytest.mark.parametrize("pair", RESHARDED, ids=" to ".join)
def test_another_layout_makes_the_same_checkpoint(two_ranks, pair):
    assert [facts["resharded"][pair] for facts in two_ranks] == [[], []]


@pytest.mark.slow
@pytest.mark.parametrize("pair", SLOWLY_RESHARDED, ids=" to ".join)
def test_more_layouts_make_the_same_checkpoint(two_slow_ranks, pair):
    assert [facts["resharded"][pair] for facts in two_slow_ranks] == [[], []]


def test_a_float32_run_takes_the_float32_copies_of_a_bf16_run(two_ranks):
    assert [facts["bf16 to float32"] for facts in two_ranks] == [[], []]


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.data())
def test_a_range_of_a_flattened_tensor_is_few_slices_in_order(shape, data):
    start = data.draw(st.integers(0, math.prod(shape)))
    end = data.draw(st.integers(start, math.prod(shape)))
    whole = torch.arange(math.prod(shape)).view(shape)
    position, found = start, list(slices_of_range(start, end, shape))
    for part in found:
        values = whole[tuple(slice(first, first + side) for first, side in zip(part.offset, part.shape, strict=True))]
        assert part.start == position
        position += math.prod(part.shape)
        assert values.flatten().tolist() == list(range(part.start, position))
    assert position == end
    assert len(found) <= 2 * len(shape) - 1


def draws():
    with tensor_parallel.get_cuda_rng_tracker().fork():
        tracked = torch.rand(1).item()
    return [random.gauss(0, 1), float(np.random.normal()), torch.rand(1).item(), tracked]


def test_restored_generators_repeat_their_numbers_and_belong_to_a_layout(alone, monkeypatch):
    draws()  # an odd number of normal draws: a second one waits in Python's and in numpy's generator
    stored = {tensor.key: tensor.data.clone() for tensor in random_tensors()}
    first = draws()
    targets = random_targets({key: tuple(data.shape) for key, data in stored.items()})
    for target in targets:
        target.data.copy_(stored[target.key])
    restore_random(targets)
    assert draws() == first
    monkeypatch.setattr(parallel_state, "get_tensor_model_parallel_world_size", lambda: 2)
    assert random_targets({key: tuple(data.shape) for key, data in stored.items()}) == []
