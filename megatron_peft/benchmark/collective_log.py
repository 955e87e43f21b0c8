"""Every collective that this rank takes part in: which, how many bytes, and in what part of a step.

Counted where torch hands them to its communication library (`c10d`), so asynchronous ones, those of a backward pass and
those that megatron-core issues through its own wrappers are all seen. Groups of one rank do not count.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

SCALARS = 8  # elements: a sum of losses, a norm, a count of tokens


@dataclass(frozen=True)
class Collective:
    """One call.

    Args:
        name: of the operator, `allreduce_`.
        elements, num_bytes: of the largest tensor list in it: what is gathered, or what is summed.
        width: elements of the last axis of that tensor.
    """

    name: str
    elements: int
    num_bytes: int
    width: int

    @property
    def is_scalar(self) -> bool:
        return self.elements <= SCALARS


class CollectiveLog(TorchDispatchMode):
    """Context manager; `calls` grows while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Collective] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d" and _group_size(args) > 1:
            self.calls.append(_describe(func, args))
        return func(*args, **(kwargs or {}))


def _group_size(args: Sequence[Any]) -> int:
    """Ranks of the process group among the arguments; an operator without one (a wait, a message) counts as 0."""
    return next(_sizes(args), 0)


def _sizes(args: Sequence[Any]) -> Iterator[int]:
    for arg in args:
        if isinstance(arg, torch.ScriptObject) and arg._type().name() == "ProcessGroup":
            yield dist.ProcessGroup.unbox(arg).size()


def _describe(func: Any, args: Sequence[Any]) -> Collective:
    lists = [[leaf for leaf in tree_leaves(arg) if isinstance(leaf, Tensor)] for arg in args]
    largest = max(lists, key=lambda tensors: sum(tensor.nbytes for tensor in tensors))
    return Collective(
        name=func.overloadpacket.__name__,
        elements=sum(tensor.numel() for tensor in largest),
        num_bytes=sum(tensor.nbytes for tensor in largest),
        width=largest[0].shape[-1] if largest and largest[0].ndim else 1,
    )
