"""Collectives on plain tensors, named after the group that they run over. A group of one rank does nothing.

Letters: s sequence, t tensor-parallel size.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from megatron_peft.config import ConfigurationError
from megatron_peft.parallel.layout import PARTIAL_OVER_TENSOR_PARALLEL
from megatron_peft.runtime.launch import checked_together

Wait = Callable[[], Tensor]


def start_sum_over_tensor_parallel(x: Tensor, group: dist.ProcessGroup) -> Wait:
    """Start adding up `x` in place over the tensor-parallel ranks; call the answer to wait and get it."""
    if group.size() == 1:
        return lambda: x
    work = dist.all_reduce(x, group=group, async_op=True)
    return lambda: _finished(work, x)


def start_gather_sequence_over_tensor_parallel(x: Tensor, group: dist.ProcessGroup) -> Wait:
    """Start joining the ranks' tokens: [s / t, ...] -> [s, ...]; call the answer to wait and get it."""
    if group.size() == 1:
        return lambda: x
    x = x.contiguous()
    joined = x.new_empty((x.shape[0] * group.size(), *x.shape[1:]))
    work = dist.all_gather_into_tensor(joined, x, group=group, async_op=True)
    return lambda: _finished(work, joined)


def start_sum_scatter_sequence_over_tensor_parallel(x: Tensor, group: dist.ProcessGroup) -> Wait:
    """Start adding up `x` and keeping a rank's own tokens: [s, ...] -> [s / t, ...]."""
    if group.size() == 1:
        return lambda: x
    x = x.contiguous()
    own = x.new_empty((x.shape[0] // group.size(), *x.shape[1:]))
    work = dist.reduce_scatter_tensor(own, x, group=group, async_op=True)
    return lambda: _finished(work, own)


def sum_coalesced(tensors: Iterable[Tensor], group: dist.ProcessGroup) -> None:
    """Add up every tensor in place over the ranks of a group, in one call for each type of element."""
    if group.size() == 1:
        return
    by_type: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        by_type.setdefault(tensor.dtype, []).append(tensor)
    for same_type in by_type.values():
        flat = _flatten_dense_tensors(same_type)
        dist.all_reduce(flat, group=group)
        for tensor, summed in zip(same_type, _unflatten_dense_tensors(flat, same_type), strict=True):
            tensor.copy_(summed)


def _finished(work: dist.Work | None, result: Tensor) -> Tensor:
    if work is not None:
        work.wait()
    return result


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


# What all ranks learn from the first one, which alone looks at a folder that another process may be changing.

Found = TypeVar("Found")


def from_first_rank(look: Callable[[], Found], group: dist.ProcessGroup | None = None) -> Found:
    """What `look` gives on rank 0, on all ranks. A collective.

    Raises:
        ConfigurationError: on all ranks, if it raised that or OSError on rank 0.
    """
    found: list[Any] = [checked_together(lambda: _on_first_rank(look), group)]
    dist.broadcast_object_list(found, src=0, group=group)
    return found[0]


def names_that_differ(own: Mapping[str, object]) -> list[str]:
    """The names of this rank's values that are not those of rank 0. A collective."""
    first = from_first_rank(lambda: dict(own))
    return sorted(name for name in first.keys() | own.keys() if own.get(name) != first.get(name))


def _on_first_rank(look: Callable[[], Found]) -> Found | None:
    if dist.get_rank() != 0:
        return None
    try:
        return look()
    except OSError as error:
        raise ConfigurationError(str(error)) from error
