"""Autograd functions: without a graph where nothing is recorded, and outputs that are made again instead of kept.

torch prepares a node of its graph for each call of an autograd function, even where no gradient is recorded. A step of
generation makes hundreds of such calls on a few numbers each: then preparing costs more than computing.

A function whose context has `make_again` says how its output follows from what that context holds. Who needs the output
in backward, which runs earlier than the function's own, can have it from there and needs not keep it.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

PASSES_ON = "_CopyToModelParallelRegionBackward"  # gives its input through as it is


class _NothingKept:
    """Stands for the context of a forward that no backward follows: what is saved is forgotten."""

    def save_for_backward(self, *tensors: Any) -> None:
        pass


def run_function(function: type[Function], *args: Any) -> Any:
    """`function.apply(*args)`; its forward alone under `torch.no_grad()`, the same numbers."""
    if torch.is_grad_enabled():
        return function.apply(*args)
    return function.forward(_NothingKept(), *args)


def maker_of(x: Tensor) -> Any:
    """The node of the operation whose output x is, if it has `make_again`; else None."""
    node: Any = x.grad_fn
    if node is not None and node.name() == PASSES_ON:
        node = node.next_functions[0][0]
    return node if hasattr(node, "make_again") else None


def made_again(maker: Any) -> Tensor:
    """The output of `maker`, equal to the last bit; only before the maker's own backward."""
    return maker.make_again(maker)
