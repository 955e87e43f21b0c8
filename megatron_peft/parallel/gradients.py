"""Sums of gradients over the tensor-parallel ranks, one call a step."""

from collections.abc import Iterable

import torch.distributed as dist
from torch import Tensor, nn

from megatron_peft.parallel.collectives import sum_coalesced
from megatron_peft.parallel.layout import PARTIAL_OVER_TENSOR_PARALLEL


def partial_gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """Gradients (in megatron-core's buffers) of the replicated adapter parameters: each rank's is its part."""
    return [
        parameter.main_grad  # pyright: ignore[reportAttributeAccessIssue]
        for parameter in parameters
        if parameter.requires_grad and getattr(parameter, PARTIAL_OVER_TENSOR_PARALLEL, False)
    ]


def sum_partial_gradients_over_tensor_parallel(model_chunks: Iterable[nn.Module], group: dist.ProcessGroup) -> None:
    """Complete the gradients of all replicated adapter parameters with one coalesced all-reduce.

    To be called after the data-parallel reduction: the sum over ranks and the sum over replicas commute, and with a
    distributed optimizer all tensor-parallel peers own the same shard of the gradient buffer.
    """
    parameters = [parameter for chunk in model_chunks for parameter in chunk.parameters()]
    sum_coalesced(partial_gradients(parameters), group)
