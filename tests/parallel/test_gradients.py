"""Which gradients are partial; that they are summed is tested on two ranks, in test_collectives.py."""

from __future__ import annotations

import torch
from torch import nn

from megatron_peft.parallel.gradients import partial_gradients, sum_partial_gradients_over_tensor_parallel
from tests.one_rank import Place
from tests.parallel.collective_runs import two_layers


def test_replicated_trainable_parameters_have_partial_gradients():
    model = two_layers(Place(0, 2), gradient=1.0)
    (found,) = partial_gradients(model)
    assert found is model[0].main_grad


def test_a_frozen_replicated_parameter_has_none():
    model = two_layers(Place(0, 2), gradient=1.0)
    model[0].requires_grad_(False)
    assert partial_gradients(model) == []


def test_parameters_of_the_base_model_are_left_to_megatron_core():
    parameter = nn.Parameter(torch.zeros(2))
    assert partial_gradients([parameter]) == []


def test_alone_nothing_is_summed():
    model = two_layers(Place(0, 1), gradient=1.0)
    sum_partial_gradients_over_tensor_parallel([model], Place(0, 1))
    assert model[0].main_grad.unique().tolist() == [1.0]
