"""Collectives on plain tensors, named after the group that they run over; with one rank they do nothing.

`start_*` returns a function that waits and returns the result.

Letters: s sequence, t tensor-parallel size.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
from torch.autograd.graph import increment_version

from megatron_peft.config import require
from megatron_peft.parallel.layout import PARTIAL_OVER_TENSOR_PARALLEL
from megatron_peft.runtime.launch import (
    FailedOnAnotherRank,
    attempt,
    checked_together,
    from_rank,
    gloo_group,
    raise_failures,
)

Wait = Callable[[], Tensor]


def start_sum_over_tensor_parallel(x: Tensor, group: dist.ProcessGroup) -> Wait:
    """Sum `x` in place over the tensor-parallel ranks."""
    if group.size() == 1:
        return lambda: x
    work = dist.all_reduce(x, group=group, async_op=True)
    return lambda: _finished(work, x)


def start_gather_sequence_over_tensor_parallel(x: Tensor, group: dist.ProcessGroup) -> Wait:
    """Gather the ranks' tokens: [s / t, ...] -> [s, ...]."""
    if group.size() == 1:
        return lambda: x
    x = x.contiguous()
    gathered = x.new_empty((x.shape[0] * group.size(), *x.shape[1:]))
    work = dist.all_gather_into_tensor(gathered, x, group=group, async_op=True)
    return lambda: _finished(work, gathered)


def start_sum_scatter_sequence_over_tensor_parallel(x: Tensor, group: dist.ProcessGroup) -> Wait:
    """Sum `x` and keep this rank's own tokens: [s, ...] -> [s / t, ...]."""
    if group.size() == 1:
        return lambda: x
    x = x.contiguous()
    own = x.new_empty((x.shape[0] // group.size(), *x.shape[1:]))
    work = dist.reduce_scatter_tensor(own, x, group=group, async_op=True)
    return lambda: _finished(work, own)


def sum_coalesced(tensors: Iterable[Tensor], group: dist.ProcessGroup) -> None:
    """Sum every tensor in place over the ranks of a group, with one all-reduce for each dtype."""
    if group.size() == 1:
        return
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        by_dtype.setdefault(tensor.dtype, []).append(tensor)
    for same_dtype in by_dtype.values():
        flat = _flatten_dense_tensors(same_dtype)
        dist.all_reduce(flat, group=group)
        for tensor, summed in zip(same_dtype, _unflatten_dense_tensors(flat, same_dtype), strict=True):
            tensor.copy_(summed)


def gather_slices(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The whole of a parameter or buffer that `parallel.layout.mark_split` describes, without gradients."""
    own = x.detach().contiguous()
    if group.size() == 1 or not getattr(x, "tensor_model_parallel", False):
        return own
    slices = [torch.empty_like(own) for _ in range(group.size())]
    dist.all_gather(slices, own, group=group)
    axis, num_parts = x.partition_dim, x.partition_stride  # pyright: ignore[reportAttributeAccessIssue]
    by_part = zip(*(shard.chunk(num_parts, axis) for shard in slices), strict=True)  # a rank holds a slice of each part
    return torch.cat([tensor for part in by_part for tensor in part], axis)


def start_broadcast(x: Tensor, source: int, group: dist.ProcessGroup | None) -> Wait:
    """Overwrite a contiguous `x` by that of the `source`-th rank of a group."""
    if group is None or group.size() == 1:
        return lambda: x
    work = dist.broadcast(x.view(torch.uint8), dist.get_global_rank(group, source), group=group, async_op=True)

    def wait() -> Tensor:
        _finished(work, x)
        increment_version(x)  # torch takes a broadcast for no change, and what was computed from x would be kept
        return x

    return wait


def share_of_rows(num_rows: int, rank: int, size: int) -> slice:
    """The rows of a matrix that `rank` of `size` has in `columns_from_rows_over_tensor_parallel`."""
    return slice(rank * num_rows // size, (rank + 1) * num_rows // size)


def columns_from_rows_over_tensor_parallel(rows: Tensor, columns: Tensor, group: dist.ProcessGroup) -> None:
    """Fill `columns` [out, in / t], contiguous, from each rank's `rows` [out / t, in] (`share_of_rows`)."""
    size, num_rows = group.size(), len(rows)
    for_each = columns.new_empty((size, num_rows, columns.shape[1]))
    for_each.copy_(rows.view(num_rows, size, columns.shape[1]).transpose(0, 1))  # a rank may have no rows
    shares = [share_of_rows(len(columns), rank, size) for rank in range(size)]
    dist.all_to_all_single(
        columns.view(torch.uint8),
        for_each.view(torch.uint8).flatten(0, 1),
        [share.stop - share.start for share in shares],
        [num_rows] * size,
        group=group,
    )


def _finished(work: dist.Work | None, result: Tensor) -> Tensor:
    if work is not None:
        work.wait()
    return result


def gradient_of(parameter: nn.Parameter) -> Tensor:
    """The gradient in megatron-core's buffer, or `parameter.grad` where no buffer was made; zeros before backward."""
    buffered = getattr(parameter, "main_grad", None)
    if buffered is not None:
        return buffered
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def sum_partial_gradients_over_tensor_parallel(model_chunks: Iterable[nn.Module], group: dist.ProcessGroup) -> None:
    """Complete the gradients of all replicated adapter parameters with one coalesced all-reduce.

    Call it after the data-parallel reduction: the two sums commute, and with a distributed optimizer all
    tensor-parallel peers own the same shard of the gradient buffer.
    """
    trained = [p for chunk in model_chunks for p in chunk.parameters() if p.requires_grad]
    sum_coalesced([gradient_of(p) for p in trained if getattr(p, PARTIAL_OVER_TENSOR_PARALLEL, False)], group)


Sent = TypeVar("Sent")
Found = TypeVar("Found")


def from_first_rank(find: Callable[[], Found], group: dist.ProcessGroup | None = None) -> Found:
    """`from_rank` of rank 0: for folders that another process may be changing. A collective."""
    return from_rank(0, find, group)


def awaited_from_first_rank(find: Callable[[], Found]) -> Found:
    """Return what `from_first_rank` does, where it may take longer than a collective may. A collective."""
    group = gloo_group()
    try:
        return from_first_rank(find, group)
    finally:
        dist.destroy_process_group(group)


def gathered_by_first_rank(
    own: Callable[[], Sent], find: Callable[[list[Sent]], Found], group: dist.ProcessGroup | None = None
) -> Found:
    """Run `own` on every rank and `find` on rank 0 over the results, and broadcast. A collective.

    Raises on all ranks as `raise_failures` does, if `own` raised on any, or `find`, whose OSError becomes
    ConfigurationError.

    Args:
        own: What each rank sends to rank 0.
        find: What rank 0 makes of the results, which come by rank.
        group: `gloo_group`, in a thread beside the main one; None is the world.
    """
    *message, error = attempt(own)
    by_rank: list[Any] | None = [message] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(message, by_rank, dst=0, group=group)

    def find_unless_failed() -> Found:
        assert by_rank is not None
        raise_failures([failure for _, failure in by_rank], None)
        return find([result for result, _ in by_rank])

    try:
        return from_first_rank(find_unless_failed, group)
    except FailedOnAnotherRank:
        if error is not None:  # it was this rank
            raise error from None
        raise


def from_first_rank_by_stage(own: Sent, find: Callable[[list[Sent]], list[Found]]) -> Found:
    """What `find` on rank 0 has for this rank's pipeline stage. A collective.

    find: from `own` of each stage's first rank, what each stage gets. All ranks of a stage get the same.

    Raises on all ranks as `from_first_rank` does.
    """
    stages: Any = parallel_state.get_pipeline_model_parallel_group()
    of_stage: Any = parallel_state.get_data_parallel_group(), parallel_state.get_tensor_model_parallel_group()
    replica, tensor_rank = (group.rank() for group in of_stage)
    is_first_of_stage = replica == tensor_rank == 0
    gathered: list[Any] = [own] * stages.size()
    answers: list[Found] = []
    if is_first_of_stage:
        first = dist.get_global_rank(stages, 0)
        dist.gather_object(own, gathered if stages.rank() == 0 else None, dst=first, group=stages)
    from_first_rank(lambda: answers.extend(find(gathered)))
    of_this_stage: list[Any] = [None]
    if is_first_of_stage:
        dist.scatter_object_list(of_this_stage, answers or None, src=dist.get_global_rank(stages, 0), group=stages)
    for group, has_it in zip(of_stage, (tensor_rank == 0, True), strict=True):
        if has_it:
            dist.broadcast_object_list(of_this_stage, src=dist.get_global_rank(group, 0), group=group)
    return of_this_stage[0]


def require_same(own: Mapping[str, object] | None, what: str, is_another: str) -> None:
    """Raise ConfigurationError on every rank if a rank reads other files than rank 0: each node may have its own.

    A collective.

    own: what this rank has read, by the name that an error gives it. None: another rank of its node has read it.
    what, is_another: words of the error.
    """
    first = from_first_rank(lambda: dict(own or {}))
    mine = first if own is None else own
    differing = sorted(name for name in first.keys() | mine.keys() if mine.get(name) != first.get(name))
    rank = dist.get_rank() if dist.is_initialized() else 0
    checked_together(
        lambda: require(
            not differing,
            f"{what} is {is_another} on rank {rank} than on rank 0 ({', '.join(differing[:8])}): copy it again to "
            f"where that rank reads it.",
        )
    )
