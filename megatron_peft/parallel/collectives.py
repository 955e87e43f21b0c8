"""Collectives on plain tensors, named after the group that they run over. A group of one rank does nothing.

Letters: s sequence, t tensor-parallel size.
"""

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

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
