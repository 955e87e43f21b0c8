"""Collectives and sums of gradients over tensor-parallel ranks; started on ranks by test_collectives.py."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_peft.config import ParallelConfig
from megatron_peft.parallel import collectives
from megatron_peft.parallel.gradients import sum_partial_gradients_over_tensor_parallel
from megatron_peft.parallel.layout import LinearLayout
from megatron_peft.runtime.launch import start_world

SHAPE = (4, 2, 3)


def tensor_of(rank: int) -> Tensor:
    return torch.arange(24.0).reshape(SHAPE) * (rank + 1) + rank


def run(_: None) -> dict[str, Any]:
    start_world(ParallelConfig())
    group: Any = dist.group.WORLD
    found = _each_collective(group)
    calls = _count_all_reduces()
    coalesced = [torch.full((3,), 1.0 + dist.get_rank()), torch.ones(2, 2).double(), torch.full((1, 2), 3.0)]
    collectives.sum_coalesced(coalesced, group)
    found |= {"coalesced": coalesced, "coalesced calls": list(calls)}
    calls.clear()
    model = two_layers(group, 1.0 + dist.get_rank())
    sum_partial_gradients_over_tensor_parallel([model], group)
    return found | {"gradients": [parameter.main_grad for parameter in model], "gradient calls": list(calls)}


def _each_collective(group: Any) -> dict[str, Tensor]:
    """Contiguous and transposed tensors: the latter arrive in backward passes."""
    x = tensor_of(dist.get_rank())
    skewed = x.transpose(1, 2).contiguous().transpose(1, 2)
    return {
        "sum": collectives.start_sum_over_tensor_parallel(skewed.clone(), group)(),
        "gather": collectives.start_gather_sequence_over_tensor_parallel(skewed, group)(),
        "scatter": collectives.start_sum_scatter_sequence_over_tensor_parallel(skewed, group)(),
    }


def _count_all_reduces() -> list[int]:
    """Elements of every all-reduce from now on."""
    calls: list[int] = []
    plain = dist.all_reduce

    def counted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append(tensor.numel())
        return plain(tensor, *args, **kwargs)

    dist.all_reduce = counted
    return calls


def two_layers(group: Any, gradient: float) -> nn.ParameterList:
    """A and B of a column layer, then a base weight without a gradient; every element's gradient is `gradient`."""
    layout = LinearLayout("column", 4, 4, group)
    model = nn.ParameterList(torch.zeros(2, 3) for _ in range(3))
    layout.mark_input(model[0])
    layout.mark_output(model[1])
    model[2].requires_grad_(False)
    for parameter in model:
        parameter.main_grad = torch.full((2, 3), gradient)
    return model
