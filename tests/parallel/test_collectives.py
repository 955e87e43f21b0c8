"""Each collective and the sum of partial gradients on two ranks, and on one, where they do nothing."""

from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_peft.parallel import collectives
from megatron_peft.parallel.collectives import sum_partial_gradients_over_tensor_parallel
from megatron_peft.parallel.layout import LinearLayout
from megatron_peft.runtime.launch import start_world
from tests.one_rank import Place
from tests.ranks import run_ranks

STARTS = {
    "sum": collectives.start_sum_over_tensor_parallel,
    "gather": collectives.start_gather_sequence_over_tensor_parallel,
    "scatter": collectives.start_sum_scatter_sequence_over_tensor_parallel,
}


def tensor_of(rank: int) -> Tensor:
    return torch.arange(24.0).reshape(4, 2, 3) * (rank + 1) + rank


def found_by_a_rank(_: None) -> dict[str, Any]:
    start_world()
    group: Any = dist.group.WORLD
    x = tensor_of(dist.get_rank())
    skewed = x.transpose(1, 2).contiguous().transpose(1, 2)  # as tensors arrive in backward passes
    found: dict[str, Any] = {name: start(skewed.clone(), group)() for name, start in STARTS.items()}
    coalesced = [torch.full((3,), 1.0 + dist.get_rank()), torch.ones(2, 2).double(), torch.full((1, 2), 3.0)]
    model = two_layers(group, 1.0 + dist.get_rank())
    with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as all_reduce:
        collectives.sum_coalesced(coalesced, group)
        sum_partial_gradients_over_tensor_parallel([model], group)
    sizes = [call.args[0].numel() for call in all_reduce.call_args_list]
    return found | {"coalesced": coalesced, "gradients": [x.main_grad for x in model], "summed": sizes}


def two_layers(group: Any, gradient: float) -> nn.ParameterList:
    """A and B of a column layer, a base weight without marks, and an A that is not trained; all gradients are alike."""
    layout = LinearLayout("column", 4, 4, group)
    model = nn.ParameterList(torch.zeros(2, 3) for _ in range(4))
    layout.mark_input(model[0])
    layout.mark_output(model[1])
    layout.mark_input(model[3].requires_grad_(False))
    for parameter in model:
        parameter.main_grad = torch.full((2, 3), gradient)
    return model


@pytest.fixture(scope="module")
def on_two_ranks():
    return run_ranks(2, found_by_a_rank)


@pytest.mark.parametrize("rank", [0, 1])
def test_values_on_two_ranks(on_two_ranks, rank):
    found, parts = on_two_ranks[rank], [tensor_of(0), tensor_of(1)]
    assert torch.equal(found["sum"], parts[0] + parts[1])
    assert torch.equal(found["gather"], torch.cat(parts))
    assert torch.equal(found["scatter"], (parts[0] + parts[1]).chunk(2)[rank])


def test_a_coalesced_sum_is_one_call_for_each_type(on_two_ranks):
    for found in on_two_ranks:
        assert [tensor.tolist() for tensor in found["coalesced"]] == [[3.0] * 3, [[2.0] * 2] * 2, [[6.0] * 2]]
        assert sorted(found["summed"][:2]) == [4, 5]


def test_only_replicated_trainable_gradients_are_summed(on_two_ranks):
    for rank, found in enumerate(on_two_ranks):
        assert [gradient.unique().tolist() for gradient in found["gradients"]] == [[3.0], *[[1.0 + rank]] * 3]
        assert found["summed"][2:] == [6]


@pytest.mark.parametrize("start", STARTS.values(), ids=STARTS)
def test_alone_a_rank_gets_its_own_tensor_back(start):
    x = tensor_of(0)
    assert start(x, Place(0, 1))() is x


def test_alone_no_gradient_is_summed():
    model = two_layers(Place(0, 1), gradient=1.0)
    sum_partial_gradients_over_tensor_parallel([model], Place(0, 1))
    assert model[0].main_grad.unique().tolist() == [1.0]
