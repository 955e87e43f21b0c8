"""Autograd functions where nothing is recorded.

torch prepares a node of its graph for each call of an autograd function, even where no gradient is recorded. A step of
generation makes hundreds of such calls on a few numbers each: then preparing costs more than computing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import Function


class _NothingKept:
    """Stands for the context of a forward that no backward follows: what is saved is forgotten."""

    def save_for_backward(self, *tensors: Any) -> None:
        pass


def run_function(function: type[Function], *args: Any) -> Any:
    """`function.apply(*args)`; its forward alone under `torch.no_grad()`, the same numbers."""
    if torch.is_grad_enabled():
        return function.apply(*args)
    return function.forward(_NothingKept(), *args)
