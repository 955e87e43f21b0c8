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
from typing import Any, Literal

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import (
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor
from torch.autograd import Function

from megatron_peft.adapters.blocks import (
    HeldBlocks,
    add_blocks,
    blocks_gradient,
    by_block,
    gradient_from_mixed_output,
    gradient_from_output,
    identity_like,
)
from megatron_peft.parallel.collectives import (
    start_gather_sequence_over_tensor_parallel,
    start_sum_over_tensor_parallel,
    start_sum_scatter_sequence_over_tensor_parallel,
)
from megatron_peft.runtime.cpu_kernels import add_linear, flat, linear, linear_plus, outer_sum
from megatron_peft.runtime.precision import full_precision

PRECISE = (torch.float32, torch.float64)

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


def frozen_linear_rotated(x: Tensor, D: Tensor, call: FrozenLinearCall, held: HeldBlocks | None = None) -> Tensor:
    """y = R W x with R = I + diag(D) orthogonal, D [k, g, g]; for outputs that need no reduction."""
    return run_function(_FrozenLinear, x, None, None, D, 1.0, call, None, None, held)


def frozen_linear_mixed(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    D: Tensor,
    scale: Tensor,
    call: FrozenLinearCall,
    mask: Tensor | None = None,
    held: HeldBlocks | None = None,
) -> Tensor:
    """y = z + diag(D) z + scale B (A (mask x)), z = W x, reduced where the layer sums its output.

    Then R acts on the reduced z, so the r-wide A x is reduced apart from it; what is kept is z, in the place of y.

    Args:
        scale: a float32 scalar tensor, a constant.
        held: of D, where it was built for the whole step.
    """
    producer = producer_of(x) if call.output_sum != "none" and mask is None else None
    if call.needs_no_sum:
        return run_function(_FrozenLinear, x, A, B, D, scale, call, mask, producer, held)
    z = call.reduce(frozen_linear(x, call))
    u = call.reduce(run_function(_NarrowProduct, x if mask is None else x * mask, A, producer))
    return run_function(_MixReduced, z, u, B, D, scale, call.own_tokens(z.shape[0] * z.shape[1]), held)


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    @full_precision
    def forward(ctx, x, A, B, D, scale, call, mask=None, producer=None, held=None):  # type: ignore[override]
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
            y = kept = linear(x, changed_weight(call.weight, A, B, D, scale, held))
            y = y if call.bias is None else y + call.bias
        else:
            y, kept = _output(x, u, B, D, call, held)
        ctx.save_for_backward(branch_input if producer is None else None, u, A, B, D, call.weight, mask, kept)
        ctx.scale, ctx.call, ctx.producer, ctx.held = scale, call, producer, held
        ctx.trained = trained_factor(A), trained_factor(B)
        return y

    @staticmethod
    @full_precision
    def backward(ctx, grad):  # type: ignore[override]
        saved, call, wait_dx = ctx.saved_tensors, ctx.call, None
        branch_input, u, A, B, D, _, _, kept = saved
        trained_A, trained_B = ctx.trained
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
        dB = outer_sum(u, grad, _gradient_dtype(trained_B)).t() if ctx.needs_input_grad[2] else None
        own_du = wait_du()
        if ctx.producer is not None:
            branch_input = recompute(ctx.producer)
        # Where A is replicated (column-parallel) this is the rank's part of dA, summed once per step with the others.
        dA = outer_sum(own_du, branch_input, _gradient_dtype(trained_A)) if ctx.needs_input_grad[1] else None
        dD = None if D is None else _changes_gradient(grad, kept, D, dB, B, ctx.held)
        dx = None if wait_dx is None else wait_dx(own_du)
        return dx, delivered(trained_A, dA), delivered(trained_B, dB), dD, None, None, None, None, None, None


class _NarrowProduct(torch.autograd.Function):
    """u = A x. SwiGLU's output is recomputed from what SwiGLU saved: a layer's widest input takes no memory twice."""

    @staticmethod
    @full_precision
    def forward(ctx, x, A, producer):  # type: ignore[override]
        ctx.save_for_backward(x if producer is None else None, A)
        ctx.producer, ctx.trained = producer, trained_factor(A)
        return linear(x, A)

    @staticmethod
    @full_precision
    def backward(ctx, grad):  # type: ignore[override]
        x, A = ctx.saved_tensors
        dA = outer_sum(grad, recompute(ctx.producer) if x is None else x, _gradient_dtype(ctx.trained))
        return linear(grad, A.t()), delivered(ctx.trained, dA), None


class _MixReduced(torch.autograd.Function):
    """y = z + diag(D) z + scale B u for z and u that are whole; gradients of B and D over this rank's tokens."""

    @staticmethod
    @full_precision
    def forward(ctx, z, u, B, D, scale, tokens, held=None):  # type: ignore[override]
        u = u * scale
        y = add_blocks(z, D, held and held.multiplier)
        flat(y).addmm_(flat(u), B.t())
        ctx.save_for_backward(z, u, B, D)
        ctx.scale, ctx.tokens, ctx.held, ctx.trained = scale, tokens, held, trained_factor(B)
        return y

    @staticmethod
    @full_precision
    def backward(ctx, grad):  # type: ignore[override]
        z, u, B, D = ctx.saved_tensors
        dz, dD = rotation_gradients(grad, D, z, kept_is_output=False, tokens=ctx.tokens, held=ctx.held)
        dB = outer_sum(flat(u)[ctx.tokens], flat(grad)[ctx.tokens], _gradient_dtype(ctx.trained)).t()
        return dz, linear(grad, B.t()).mul_(ctx.scale), delivered(ctx.trained, dB), dD, None, None, None


def rotation_gradients(
    grad: Tensor,
    D: Tensor,
    kept: Tensor,
    kept_is_output: bool,
    tokens: slice = slice(None),
    held: HeldBlocks | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(dz, dD) of y = z + diag(D) z; no dD where the step's total takes it.

    Args:
        grad: dy, [s, b, k g].
        D: [k, g, g].
        kept: y of an orthogonal R = I + D, for which dD = g^T z = (g^T y) R; or z.
        tokens: rows of the flattened tokens that dD is summed over.
        held: of D, where it was built for the whole step.
    """
    grad_z = _unrotated(grad, D, held)
    own_grad, own_kept = flat(grad)[tokens], flat(kept)[tokens]
    if held is not None or kept_is_output:
        return grad_z, _changes_gradient(own_grad, own_kept, D, None, None, held)
    return grad_z, blocks_gradient(own_grad, own_kept, D)


def _unrotated(grad: Tensor, D: Tensor, held: HeldBlocks | None) -> Tensor:
    """dz = (I + D)^T g."""
    return add_blocks(grad, D.transpose(1, 2), None if held is None else held.multiplier.transpose(1, 2))


def _changes_gradient(
    grad: Tensor, kept: Tensor, D: Tensor, dB: Tensor | None, B: Any, held: HeldBlocks | None
) -> Tensor | None:  # -> [k, g, g]
    """dD of one microbatch; None where `held` sums it up and the constant factor comes once a step."""
    if held is not None:
        return held.accumulate(grad, kept, dB, B)
    products = blocks_gradient(grad, kept, D)
    if dB is None:
        return gradient_from_output(products, D)
    return gradient_from_mixed_output(products.baddbmm_(*by_block(dB, B, D), alpha=-1), D)


def trained_factor(factor: Any) -> Any:
    """The parameter whose gradient a factor's is, or begins with where a start is joined to it (`join_start`)."""
    return getattr(factor, "trained", factor)


def join_start(parameter: Tensor, start: Tensor, dim: int) -> Tensor:
    """The parameter and then its start, as one factor that knows whose gradient it has."""
    joined: Any = torch.cat([parameter, start], dim)
    joined.trained = parameter
    return joined


def _gradient_dtype(factor: Any) -> torch.dtype:
    """float32 where the factor's gradient goes into a buffer of megatron-core's; else the factor's own."""
    return torch.float32 if hasattr(factor, "main_grad") and factor.dtype not in PRECISE else factor.dtype


def delivered(factor: Any, gradient: Tensor | None) -> Tensor | None:
    """A factor's gradient for autograd, which would round it to the factor's type before it reaches the buffer.

    Where it has more precision than the factor it is added to megatron-core's buffer here, as its fused kernel of
    gradient accumulation does: autograd gets a tensor without a value, so that the hooks for a parameter run.
    """
    if gradient is None or gradient.dtype == factor.dtype:
        return gradient
    factor.main_grad.add_(gradient[: factor.shape[0], : factor.shape[1]])  # a joined start has none
    factor.grad_added_to_main_grad = True
    return factor.new_empty(gradient.shape)


def rotates_weight(x: Tensor, weight: Tensor, D: Tensor | None) -> bool:
    """Whether the change goes into W for the moment of a product, y = (W + D W + s B A) x.

    At as many tokens as W has columns, or more, rotating W costs less than rotating z. The changed weight, formed in
    forward and again in backward, is no larger than z and never kept. Not in a low precision, where rounding W + dW
    would lose a small change. A low rank alone gains nothing by it.
    """
    return D is not None and D.dtype == weight.dtype in PRECISE and x[..., 0].numel() >= weight.shape[1]


def changed_weight(
    weight: Tensor, A: Any, B: Any, D: Tensor, scale: Any, held: HeldBlocks | None = None
) -> Tensor:  # -> [out, in]
    """W + D W + scale B A, this rank's slice: a copy."""
    R = D + identity_like(D) if held is None else held.multiplier
    changed = torch.bmm(R, weight.view(*R.shape[:2], -1)).view_as(weight)
    return changed if A is None else changed.addmm_(B, A * scale)


def _output(x: Tensor, u: Tensor | None, B: Tensor, D: Tensor | None, call: FrozenLinearCall, held: Any):
    """(y, the tensor saved for the rotation's backward): y = z + D z + B u + bias, z = W x."""
    if D is None:
        y = linear(x, call.weight, call.bias) if u is None else linear_plus(x, call.weight, u, B, call.bias)  # type: ignore[arg-type]
        return y, None
    y = add_blocks(linear(x, call.weight), D, held and held.multiplier)
    if u is not None:
        flat(y).addmm_(flat(u), B.t())  # type: ignore[union-attr]
    return (y if call.bias is None else y + call.bias), y


def _start_input_gradient(ctx: Any, saved: tuple[Any, ...], grad: Tensor, du: Any) -> Callable[[Any], Tensor]:
    """Begin dx = dz W + mask (du A). Returns a function of the du of this rank's tokens: waits, and returns dx."""
    (_, _, A, B, D, weight, mask, _), call = saved, ctx.call
    if ctx.rotates_weight:  # the branch is in the weight
        weight, A, grad_z = changed_weight(weight, A, B, D, ctx.scale, ctx.held), None, grad
    else:
        grad_z = grad if D is None else _unrotated(grad, D, ctx.held)
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
