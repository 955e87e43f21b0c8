"""Fill the parameters of many ranks so that a byte of a file is read once for all data-parallel replicas.

Replicas hold the same slices: one of them reads a parameter and broadcasts it. Columns of a matrix are strided in a
file, so each tensor-parallel rank reads its share of the rows, which is contiguous, and an all-to-all makes columns of
them. Values are converted to the parameter's type before they are sent, which gives the same bits as reading alone.

All ranks issue these collectives in the order of the parameters, so no two wait for each other. A rank that fails stops
reading but goes on taking part, or the others would hang; at the end its error is raised on all ranks.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn

from megatron_peft.config import ConfigurationError
from megatron_peft.models.rules import Columns, RowRange, Rule
from megatron_peft.parallel.collectives import (
    Wait,
    columns_from_rows_over_tensor_parallel,
    share_of_rows,
    start_broadcast_over_data_parallel,
)
from megatron_peft.runtime.launch import checked_together, wait_for_device

MAX_IN_FLIGHT = 4  # broadcasts that have started and not ended


class Readable(Protocol):
    """What is needed of an open base model; see `conversion.pretrained.Weights`."""

    def read(self, rule: Rule, local: Tensor, rank: int, size: int) -> None:
        """Fill a tensor-parallel rank's local tensor in place."""
        ...

    def read_rows(self, rule: Rule, rows: RowRange, target: Tensor) -> None:
        """Fill `target` with some rows of a parameter."""
        ...

    def holds_whole_rows(self, rule: Rule, dtype: torch.dtype) -> bool:
        """Whether columns of a parameter are strided in the files."""
        ...


@dataclass(frozen=True)
class ReadingGroups:
    """The ranks that read for one another; None for a group in which this one is alone."""

    tensor_parallel: dist.ProcessGroup | None = None
    data_parallel: dist.ProcessGroup | None = None

    @classmethod
    def of_layout(cls) -> "ReadingGroups":
        """megatron-core's groups, which `runtime.launch.start_model_parallel` has made."""
        tensor_parallel: Any = parallel_state.get_tensor_model_parallel_group()
        data_parallel: Any = parallel_state.get_data_parallel_group()
        return cls(tensor_parallel, data_parallel)


ALONE = ReadingGroups()


@torch.no_grad()
def fill_parameters(
    to_fill: Sequence[tuple[Rule, nn.Parameter]],
    weights: Readable,
    tensor_parallel_rank: int,
    tensor_parallel_size: int,
    groups: ReadingGroups,
    advance: Callable[[int], None],
) -> None:
    """Fill parameters in place and in this order, which must be the same on all ranks of the groups.

    Args:
        to_fill: parameters, contiguous, with their rules.
        advance: called with the bytes of every parameter that has been read or is being sent.

    Raises:
        ConfigurationError: on all ranks, if a rank cannot read its part.
    """
    reader = _Reader(weights, tensor_parallel_rank, tensor_parallel_size, groups.tensor_parallel)
    replicas = groups.data_parallel
    own, num_replicas = (0, 1) if replicas is None else (replicas.rank(), replicas.size())
    sources = _sources((parameter.nbytes for _, parameter in to_fill), num_replicas)
    in_flight: deque[Wait] = deque()
    for (rule, parameter), source in zip(to_fill, sources, strict=True):
        if source == own:
            reader.fill(rule, parameter.detach())
        in_flight.append(start_broadcast_over_data_parallel(parameter.detach(), source, replicas))
        if len(in_flight) > MAX_IN_FLIGHT:
            in_flight.popleft()()
            wait_for_device()
        advance(parameter.nbytes)
    for wait in in_flight:
        wait()
    checked_together(reader.raise_failure)


def _sources(sizes: Iterable[int], num_replicas: int) -> Iterator[int]:
    """The replica that reads each parameter of so many bytes: the one that has read least so far."""
    loads = [0] * num_replicas
    for size in sizes:
        source = loads.index(min(loads))
        loads[source] += size
        yield source


class _Reader:
    """Reads the parameters of a tensor-parallel rank until a read fails."""

    def __init__(self, weights: Readable, rank: int, size: int, group: dist.ProcessGroup | None) -> None:
        self._weights, self._rank, self._size, self._group = weights, rank, size, group
        self._failure: ConfigurationError | None = None

    def fill(self, rule: Rule, local: Tensor) -> None:
        """Fill a rank's local tensor. A collective of the tensor-parallel group."""
        is_strided = isinstance(rule, Columns) and self._size > 1
        if is_strided and self._group is not None and self._weights.holds_whole_rows(rule, local.dtype):
            self._fill_columns(rule, local, self._group)
        else:
            self._read(lambda: self._weights.read(rule, local, self._rank, self._size))

    def _fill_columns(self, rule: Rule, local: Tensor, group: dist.ProcessGroup) -> None:
        rows = share_of_rows(len(local), self._rank, self._size)
        width = local.shape[1] * self._size
        own = torch.empty((rows.stop - rows.start, width), dtype=local.dtype)  # on the host: one slice
        self._read(lambda: self._weights.read_rows(rule, RowRange(rule.hf_tensors[0].name, rows, rows), own))
        columns_from_rows_over_tensor_parallel(own, local, group)

    def _read(self, read: Callable[[], None]) -> None:
        if self._failure is None:
            try:
                read()
            except ConfigurationError as error:
                self._failure = error

    def raise_failure(self) -> None:
        """Raise the error of the read that failed, if one did."""
        if self._failure is not None:
            raise self._failure
