"""Each collective and the sum of partial gradients on two ranks, and on one, where it is nothing."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from megatron_peft.parallel import collectives
from megatron_peft.parallel.gradients import partial_gradients, sum_partial_gradients_over_tensor_parallel
from tests.one_rank import Place
from tests.parallel import collective_runs
from tests.parallel.collective_runs import tensor_of, two_layers
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def on_two_ranks():
    return run_ranks(2, collective_runs.run)


@pytest.mark.parametrize("rank", [0, 1])
def test_values_on_two_ranks(on_two_ranks, rank):
    found, parts = on_two_ranks[rank], [tensor_of(0), tensor_of(1)]
    assert torch.equal(found["sum"], parts[0] + parts[1])
    assert torch.equal(found["gather"], torch.cat(parts))
    assert torch.equal(found["scatter"], (parts[0] + parts[1]).chunk(2)[rank])


def test_a_coalesced_sum_is_one_call_for_each_type(on_two_ranks):
    for found in on_two_ranks:
        assert [tensor.tolist() for tensor in found["coalesced"]] == [[3.0] * 3, [[2.0] * 2] * 2, [[6.0] * 2]]
        assert sorted(found["coalesced calls"]) == [4, 5]


def test_only_replicated_trainable_gradients_are_summed(on_two_ranks):
    for rank, found in enumerate(on_two_ranks):
        assert [gradient.unique().tolist() for gradient in found["gradients"]] == [[3.0], [1.0 + rank], [1.0 + rank]]
        assert found["gradient calls"] == [6]


STARTS = (
    collectives.start_sum_over_tensor_parallel,
    collectives.start_gather_sequence_over_tensor_parallel,
    collectives.start_sum_scatter_sequence_over_tensor_parallel,
)


@pytest.mark.parametrize("start", STARTS)
def test_alone_a_rank_gets_its_own_tensor_back(start):
    x = tensor_of(0)
    assert start(x, Place(0, 1))() is x


def test_alone_no_gradient_is_summed():
    model = two_layers(Place(0, 1), gradient=1.0)
    sum_partial_gradients_over_tensor_parallel([model], Place(0, 1))
    assert model[0].main_grad.unique().tolist() == [1.0]


def test_replicated_trainable_parameters_have_partial_gradients_and_the_base_model_is_megatron_cores():
    model = two_layers(Place(0, 2), gradient=1.0)
    (found,) = partial_gradients(model)
    assert found is model[0].main_grad
    model[0].requires_grad_(False)
    assert partial_gradients(model) == partial_gradients([nn.Parameter(torch.zeros(2))]) == []
