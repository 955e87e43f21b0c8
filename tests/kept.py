"""What autograd keeps for a backward, and how large what operations make is."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


@contextmanager
def kept_for_backward() -> Iterator[list[Tensor]]:
    """The tensors that operations keep meanwhile, one entry for each time."""
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


class NewTensors(TorchDispatchMode):
    """The size of the largest tensor that an operation makes; views are not made."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        outputs = made if isinstance(made, tuple | list) else (made,)
        for output, declared in zip(outputs, func._schema.returns, strict=False):
            if isinstance(output, Tensor) and declared.alias_info is None:
                self.largest = max(self.largest, output.numel())
        return made
