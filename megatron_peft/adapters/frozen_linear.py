"""The product with a frozen weight, and what the layers of all methods share: z = W x.

    backward, with g = dy:     dx = g W

One autograd function a method, fused by hand, so that what it adds costs its arithmetic and little else: products are
accumulated onto one another, its part of dx joins the base's before the one all-reduce (or reduce-scatter) that the
base does anyway, and little is kept for backward.

    y = W x + s B (A x)                     `low_rank_linear.py`
    y = R W x                               `rotated_linear.py`
    y = W x + D W x + s B (A x)             `hybrid.py`

Letters: s sequence, b batch, t tensor-parallel size; in and out are a rank's own.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import (
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor
from torch.autograd import Function

from megatron_peft.adapters.quantized_weight import dense
from megatron_peft.parallel.collectives import (
    start_gather_sequence_over_tensor_parallel,
    start_sum_over_tensor_parallel,
    start_sum_scatter_sequence_over_tensor_parallel,
)
from megatron_peft.runtime.cpu_kernels import linear
from megatron_peft.runtime.precision import full_precision

# Autograd functions. torch prepares a graph node for each call, even if no gradient is recorded: in a step of
# generation, with hundreds of calls on a few numbers each, that costs more than the computation.
#
# A function whose context has `recompute_output` can recompute its output from what it saved. Consumers, whose backward
# runs before the function's own, use it instead of saving the output a second time.

PASSES_ON = "_CopyToModelParallelRegionBackward"  # an identity in forward


class _NothingKept:
    """A dummy autograd context for inference: discards saved tensors."""

    def save_for_backward(self, *tensors: Any) -> None:
        pass


def run_function(function: type[Function], *args: Any) -> Any:
    """`function.apply(*args)`; its forward alone under `torch.no_grad()`, the same numbers."""
    if torch.is_grad_enabled():
        return function.apply(*args)
    return function.forward(_NothingKept(), *args)


def producer_of(x: Tensor) -> Any:
    """The node of the operation whose output x is, if it has `recompute_output`; else None."""
    node: Any = x.grad_fn
    if node is not None and node.name() == PASSES_ON:
        node = node.next_functions[0][0]
    return node if hasattr(node, "recompute_output") else None


def recompute(producer: Any) -> Tensor:
    """The output of `producer`, bit for bit; only before the producer's own backward."""
    return producer.recompute_output(producer)


@dataclass(frozen=True)
class FrozenLinearCall:
    """A frozen linear layer during its forward, as megatron-core would run it.

    stored: the weight [out, in], of which `weight` is the matrix.
    bias: [out] or None; added here only where the layer does not leave it to its caller.
    sums_input_gradient: the input is whole on every rank, so dx is a partial sum (column, no sequence parallelism).
    splits_sequence: the input holds the rank's own tokens only, [s / t, b, in].
    group: tensor-parallel ranks.
    output_sum: what the layer does to its ranks' parts of the output: "none" (column: they are features of their
        own), "whole" (row: an all-reduce) or "own tokens" (row, sequence parallelism: a reduce-scatter).
    """

    stored: Tensor
    bias: Tensor | None
    sums_input_gradient: bool
    splits_sequence: bool
    group: dist.ProcessGroup
    output_sum: Literal["none", "whole", "own tokens"] = "none"

    @property
    def weight(self) -> Tensor:  # [out, in]
        """W for the moment of a product: a quantized one is made dense anew each time. Don't save it for backward, but
        ask again there.
        """
        return dense(self.stored)

    def reduce(self, y: Tensor) -> Tensor:  # [s, b, out] -> the same, or [s / t, b, out]
        """The layer's own sum of its ranks' parts. It carries gradients."""
        if self.needs_no_sum:
            return y
        y = y.contiguous()  # anything else comes back from megatron-core's sum as it was
        if self.output_sum == "own tokens":
            return reduce_scatter_to_sequence_parallel_region(y, group=self.group)
        if torch.is_grad_enabled():
            return reduce_from_tensor_model_parallel_region(y, group=self.group)
        return start_sum_over_tensor_parallel(y, self.group)()

    @property
    def needs_no_sum(self) -> bool:
        """Whether W x is the layer's output as it is: column-parallel, or all of a row-parallel layer on one rank."""
        return self.output_sum == "none" or self.group.size() == 1

    def own_tokens(self, num_tokens: int) -> slice:
        """The tokens of the reduced output over which this rank computes a replicated parameter's gradient.

        Where every rank sees all tokens each takes 1 / t of them, so that the ranks' parts add up to the whole.
        """
        if self.output_sum != "whole":
            return slice(0, num_tokens)
        rank, size = self.group.rank(), self.group.size()
        return slice(num_tokens * rank // size, num_tokens * (rank + 1) // size)


def frozen_linear(x: Tensor, call: FrozenLinearCall) -> Tensor:  # [s, b, in] -> [s, b, out]
    """z = W x (plus `call.bias`, if there is one), unreduced."""
    return run_function(_FrozenLinear, x, call)


class _FrozenLinear(Function):
    @staticmethod
    @full_precision
    def forward(ctx, x, call):  # type: ignore[override]
        ctx.call = call
        return linear(whole_sequence(x, call), call.weight, call.bias)

    @staticmethod
    @full_precision
    def backward(ctx, grad):  # type: ignore[override]
        if not ctx.needs_input_grad[0]:  # in the first layer, whose input is the frozen embedding's output
            return None, None
        return start_input_gradient(linear(grad, ctx.call.weight.t()), ctx.call)(), None


def whole_sequence(x: Tensor, call: FrozenLinearCall) -> Tensor:  # [s / t, b, in] -> [s, b, in]
    """The tokens of all ranks, where each has its own."""
    return start_gather_sequence_over_tensor_parallel(x, call.group)() if call.splits_sequence else x


def start_input_gradient(dx: Tensor, call: FrozenLinearCall) -> Callable[[], Tensor]:
    """Begin dx's one wide collective, if the layer has one: a sum over the ranks, to its own tokens if they are split.

    Returns a function that waits, and returns dx.
    """
    if call.splits_sequence:
        return start_sum_scatter_sequence_over_tensor_parallel(dx, call.group)
    return start_sum_over_tensor_parallel(dx, call.group) if call.sums_input_gradient else lambda: dx
