"""Products with a frozen weight: one autograd function for the layer, its low-rank branch and its rotation.

    y = z + D z + s B (A x),   z = W x,   D = diag(R_1, ..., R_k) - I        either branch may be missing

Fused by hand so that the branches cost their arithmetic and little else: products are accumulated onto one another,
the branch's part of dx joins the base's before the one all-reduce (or reduce-scatter) that the base does anyway, and
what is kept for backward is the rank's own x once, the r-wide u and, for a rotation, y, which the next operation often
keeps anyway.

    backward, with g = dy:   u = s A x             du = s g B   dB = g^T u   dA = du^T x
                             dz = (I + D)^T g      dx = dz W + du A          dD = g^T z

Letters: s sequence, b batch, r rank, t tensor-parallel size, k blocks of g features; in and out are a rank's own.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import (
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor
from torch.autograd import Function

from megatron_peft.parallel.collectives import (
    start_gather_sequence_over_tensor_parallel,
    start_sum_over_tensor_parallel,
    start_sum_scatter_sequence_over_tensor_parallel,
)
from megatron_peft.runtime.cpu_kernels import add_linear, flat, linear, linear_plus, outer_sum, outer_sums

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


# Products of activations with a block-diagonal matrix: contiguous groups of features, each with its own g x g block.
#
# Letters: n tokens (any leading axes), k blocks, g features of a block.


def add_blocks(x: Tensor, blocks: Tensor) -> Tensor:  # [..., k g], [k, g, g] -> [..., k g]
    """x + diag(blocks) x, one batched product that writes into place; with blocks = R - I this is R x.

    In the blocks' own precision x is multiplied by I + blocks, which spares a pass over x and one over the answer. In a
    lower one the identity part must stay exact: x is copied and the product with the blocks is added to it.
    """
    if x.dtype == blocks.dtype:
        out, beta = torch.empty_like(x, memory_format=torch.contiguous_format), 0
        blocks = blocks + identity_like(blocks)
    else:
        out, beta = x.clone(memory_format=torch.contiguous_format), 1
    grouped(out, blocks).baddbmm_(grouped(x, blocks), blocks.to(x.dtype).transpose(1, 2), beta=beta)
    return out


def rotate_rows(weight: Tensor, blocks: Tensor) -> Tensor:  # [k g, in], [k, g, g] -> [k g, in]
    """(I + diag(blocks)) W: a copy of the weight with its rows rotated."""
    return torch.bmm(blocks + identity_like(blocks), weight.view(*blocks.shape[:2], -1)).view_as(weight)


def identity_like(blocks: Tensor) -> Tensor:  # [..., g, g] -> [g, g]
    """The identity, to be read only; made once."""
    return _identity(blocks.shape[-1], blocks.dtype, blocks.device)


@cache
def _identity(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.eye(size, dtype=dtype, device=device)


def blocks_gradient(grad: Tensor, x: Tensor, blocks: Tensor) -> Tensor:  # [..., k g] twice -> [k, g, g]
    """Per-block sum over tokens of grad x^T, in the dtype of `blocks`."""
    return outer_sums(grouped(grad, blocks).transpose(1, 2), grouped(x, blocks), blocks.dtype)


def grouped(x: Tensor, blocks: Tensor) -> Tensor:  # [..., k g] -> [k, n, g], a view where x is contiguous
    """x by the groups of features that the blocks [k, g, g] act on, with the n tokens of x flattened."""
    return x.reshape(-1, *blocks.shape[:2]).transpose(0, 1)


PRECISE = (torch.float32, torch.float64)


@dataclass(frozen=True)
class FrozenLinearCall:
    """A frozen linear layer during its forward, as megatron-core would run it.

    Args:
        weight: [out, in].
        bias: [out] or None; added here only where the layer does not leave it to its caller.
        sums_input_gradient: the input is whole on every rank, so dx is a partial sum (column, no sequence parallelism).
        splits_sequence: the input holds the rank's own tokens only, [s / t, b, in].
        group: tensor-parallel ranks.
        output_sum: what the layer does to its ranks' parts of the output: "none" (column: they are features of their
            own), "whole" (row: an all-reduce) or "own tokens" (row, sequence parallelism: a reduce-scatter).
    """

    weight: Tensor
    bias: Tensor | None
    sums_input_gradient: bool
    splits_sequence: bool
    group: dist.ProcessGroup
    output_sum: Literal["none", "whole", "own tokens"] = "none"

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
    return run_function(_FrozenLinear, x, None, None, None, 1.0, call)


def frozen_linear_plus_low_rank(
    x: Tensor, A: Tensor, B: Tensor, scale: float, call: FrozenLinearCall, mask: Tensor | None = None
) -> Tensor:
    """y = W x + s B (A (mask x)), unreduced.

    Args:
        x: [s, b, in], or [s / t, b, in] where the sequence is split.
        A, B: [r, in], [out, r].
        mask: dropout of the branch's input, shaped like x.

    Returns:
        [s, b, out].
    """
    return run_function(_FrozenLinear, x, A, B, None, scale, call, mask)


def frozen_linear_rotated(x: Tensor, D: Tensor, call: FrozenLinearCall) -> Tensor:
    """y = R W x with R = I + diag(D) orthogonal, D [k, g, g]; for outputs that need no reduction."""
    return run_function(_FrozenLinear, x, None, None, D, 1.0, call)


def frozen_linear_mixed(
    x: Tensor, A: Tensor, B: Tensor, D: Tensor, scale: Tensor, call: FrozenLinearCall, mask: Tensor | None = None
) -> Tensor:
    """y = z + diag(D) z + scale B (A (mask x)), z = W x, reduced where the layer sums its output.

    Then R acts on the reduced z, so the r-wide A x is reduced apart from it; what is kept is z, in the place of y.

    Args:
        scale: a float32 scalar tensor, a constant.
    """
    producer = producer_of(x) if call.output_sum != "none" and mask is None else None
    if call.needs_no_sum:
        return run_function(_FrozenLinear, x, A, B, D, scale, call, mask, producer)
    z = call.reduce(frozen_linear(x, call))
    u = call.reduce(run_function(_NarrowProduct, x if mask is None else x * mask, A, producer))
    return _MixReduced.apply(z, u, B, D, scale, call.own_tokens(z.shape[0] * z.shape[1]))  # type: ignore[return-value]


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, A, B, D, scale, call, mask=None, producer=None):  # type: ignore[override]
        branch_input, u = None, None
        if A is not None:
            branch_input = x if mask is None else x * mask
            u = linear(branch_input, A).mul_(scale)
        if call.splits_sequence:
            wait_u = start_gather_sequence_over_tensor_parallel(u, call.group) if u is not None else None
            x = start_gather_sequence_over_tensor_parallel(x, call.group)()
            u = wait_u() if wait_u is not None else None
        ctx.rotates_weight = mask is None and rotates_weight(x, call.weight, D)
        if ctx.rotates_weight:
            y = kept = linear(x, changed_weight(call.weight, A, B, D, scale))
            y = y if call.bias is None else y + call.bias
        else:
            y, kept = _output(x, u, B, D, call)
        ctx.save_for_backward(branch_input if producer is None else None, u, A, B, D, call.weight, mask, kept)
        ctx.scale, ctx.call, ctx.producer = scale, call, producer
        return y

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        saved, call, wait_dx = ctx.saved_tensors, ctx.call, None
        branch_input, u, A, B, D, _, _, kept = saved
        # du = s g B is a sum over the ranks' output features. With the sequence split, each rank needs that sum for its
        # own tokens only: the r-wide reduce-scatter runs while dx is computed.
        du: Any = None if A is None else linear(grad, B.t()).mul_(ctx.scale)
        wait_du: Callable[[], Any] = lambda: du  # noqa: E731
        if du is not None and call.splits_sequence:
            wait_du = start_sum_scatter_sequence_over_tensor_parallel(du, call.group)
        # dx starts its one wide collective here; the gradients of the factors are computed while it runs.
        if ctx.needs_input_grad[0]:  # not in the first layer: its input is the frozen embedding's output
            wait_dx = _start_input_gradient(ctx, saved, grad, du)
        # u carries the scale s already and, with the sequence split, the tokens of all ranks.
        dB = outer_sum(u, grad).t() if ctx.needs_input_grad[2] else None
        own_du = wait_du()
        if ctx.producer is not None:
            branch_input = recompute(ctx.producer)
        # Where A is replicated (column-parallel) this is the rank's part of dA, summed once per step with the others.
        dA = outer_sum(own_du, branch_input) if ctx.needs_input_grad[1] else None
        # z was not saved: y gives it back through the inverse of I + D.
        dD = None if D is None else _changes_gradient(grad, kept, D, dB, B)
        dx = None if wait_dx is None else wait_dx(own_du)
        return dx, dA, dB, dD, None, None, None, None


class _NarrowProduct(torch.autograd.Function):
    """u = A x. SwiGLU's output is recomputed from what SwiGLU saved: a layer's widest input takes no memory twice."""

    @staticmethod
    def forward(ctx, x, A, producer):  # type: ignore[override]
        ctx.save_for_backward(x if producer is None else None, A)
        ctx.producer = producer
        return linear(x, A)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        x, A = ctx.saved_tensors
        dA = outer_sum(grad, recompute(ctx.producer) if x is None else x)
        return linear(grad, A.t()), dA, None


class _MixReduced(torch.autograd.Function):
    """y = z + diag(D) z + scale B u for z and u that are whole; gradients of B and D over this rank's tokens."""

    @staticmethod
    def forward(ctx, z, u, B, D, scale, tokens):  # type: ignore[override]
        u = u * scale
        y = add_blocks(z, D)
        flat(y).addmm_(flat(u), B.t())
        ctx.save_for_backward(z, u, B, D)
        ctx.scale, ctx.tokens = scale, tokens
        return y

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        z, u, B, D = ctx.saved_tensors
        dz, dD = rotation_gradients(grad, D, z, kept_is_output=False, tokens=ctx.tokens)
        dB = outer_sum(flat(u)[ctx.tokens], flat(grad)[ctx.tokens]).t()
        return dz, linear(grad, B.t()).mul_(ctx.scale), dB, dD, None, None


def rotation_gradients(
    grad: Tensor, D: Tensor, kept: Tensor, kept_is_output: bool, tokens: slice = slice(None)
) -> tuple[Tensor, Tensor]:
    """(dz, dD) of y = z + diag(D) z.

    Args:
        grad: dy, [s, b, k g].
        D: [k, g, g].
        kept: y of an orthogonal R = I + D, for which dD = g^T z = (g^T y) R; or z.
        tokens: rows of the flattened tokens that dD is summed over.
    """
    grad_z = add_blocks(grad, D.transpose(1, 2))
    own_grad, own_kept = flat(grad)[tokens], flat(kept)[tokens]
    if kept_is_output:
        return grad_z, _changes_gradient(own_grad, own_kept, D, None, None)
    return grad_z, blocks_gradient(own_grad, own_kept, D)


def _changes_gradient(grad: Tensor, y: Tensor, D: Tensor, dB: Tensor | None, B: Any) -> Tensor:  # -> [k, g, g]
    """dD out of y: (g^T y - dB B^T) (I + D)^-T; (g^T y)(I + D) where there is no low rank and I + D is orthogonal.

    That is g^T z with z = (I + D)^-1 (y - B u), block by block, without forming z. I + D of a mixture,
    lambda I + (1 - lambda) R, has no inverse only where lambda is 1/2 and R has an eigenvalue of -1.
    """
    products = blocks_gradient(grad, y, D)
    if dB is None:
        return torch.baddbmm(products, products, D)
    by_block = (*D.shape[:2], -1)
    products -= (dB.reshape(by_block) @ B.reshape(by_block).transpose(1, 2)).to(D.dtype)
    solved = torch.linalg.solve_ex(D + identity_like(D), products.transpose(1, 2))  # unchecked: no wait for CUDA
    return solved.result.transpose(1, 2)


def rotates_weight(x: Tensor, weight: Tensor, D: Tensor | None) -> bool:
    """Whether the change goes into W for the moment of a product, y = (W + D W + s B A) x.

    At as many tokens as W has columns, or more, rotating W costs less than rotating z. The changed weight, formed in
    forward and again in backward, is no larger than z and never kept. Not in a low precision, where rounding W + dW
    would lose a small change. A low rank alone gains nothing by it.
    """
    return D is not None and D.dtype == weight.dtype in PRECISE and x[..., 0].numel() >= weight.shape[1]


def changed_weight(weight: Tensor, A: Any, B: Any, D: Tensor, scale: Any) -> Tensor:  # -> [out, in]
    """W + D W + scale B A, this rank's slice."""
    changed = rotate_rows(weight, D)
    return changed if A is None else changed.addmm_(B, A * scale)


def _output(x: Tensor, u: Tensor | None, B: Tensor, D: Tensor | None, call: FrozenLinearCall):
    """(y, the tensor saved for the rotation's backward): y = z + D z + B u + bias, z = W x."""
    if D is None:
        y = linear(x, call.weight, call.bias) if u is None else linear_plus(x, call.weight, u, B, call.bias)  # type: ignore[arg-type]
        return y, None
    y = add_blocks(linear(x, call.weight), D)
    if u is not None:
        flat(y).addmm_(flat(u), B.t())  # type: ignore[union-attr]
    return (y if call.bias is None else y + call.bias), y


def _start_input_gradient(ctx: Any, saved: tuple[Any, ...], grad: Tensor, du: Any) -> Callable[[Any], Tensor]:
    """Begin dx = dz W + mask (du A). Returns a function of the du of this rank's tokens: waits, and returns dx."""
    (_, _, A, B, D, weight, mask, _), call = saved, ctx.call
    if ctx.rotates_weight:  # the branch is in the weight
        weight, A, grad_z = changed_weight(weight, A, B, D, ctx.scale), None, grad
    else:
        grad_z = grad if D is None else add_blocks(grad, D.transpose(1, 2))
    if call.splits_sequence:
        wait = start_sum_scatter_sequence_over_tensor_parallel(linear(grad_z, weight.t()), call.group)
        return lambda own_du: _add_branch(wait(), own_du, A, mask)
    dx = _input_gradient(grad_z, weight, du, A, mask)
    wait = start_sum_over_tensor_parallel(dx, call.group) if call.sums_input_gradient else lambda: dx
    return lambda own_du: wait()


def _input_gradient(grad_z: Tensor, weight: Tensor, du: Any, A: Tensor | None, mask: Tensor | None) -> Tensor:
    """dz W + mask (du A)."""
    if A is None:
        return linear(grad_z, weight.t())
    if mask is None:
        return linear_plus(grad_z, weight.t(), du, A.t())
    return add_linear((du @ A).mul_(mask), grad_z, weight.t())


def _add_branch(dx: Tensor, du: Any, A: Tensor | None, mask: Tensor | None) -> Tensor:
    """dx + mask (du A), in place where nothing has to be masked."""
    if A is None:
        return dx
    if mask is None:
        flat(dx).addmm_(flat(du), A)
        return dx
    return dx.addcmul_(mask, du @ A)
