"""A frozen weight and a low rank beside it: y = W x + s B (A (m x)), m a mask of dropout.

    forward      u = s A (m x)     y = W x + B u
    backward     du = s g B        dx = g W + m (du A)     dA = du^T (m x)     dB = g^T u           with g = dy

The narrow products are accumulated onto the wide ones. Kept for backward are the rank's own m x once, and the r-wide u.
With the sequence split, u and du have collectives of their own, r wide, which run beside the wide ones.

Letters: s sequence, b batch, r rank, t tensor-parallel size; in and out are a rank's own.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from megatron_peft.adapters.frozen_linear import FrozenLinearCall, run_function, start_input_gradient, whole_sequence
from megatron_peft.parallel.collectives import (
    Wait,
    start_gather_sequence_over_tensor_parallel,
    start_sum_scatter_sequence_over_tensor_parallel,
)
from megatron_peft.runtime.cpu_kernels import add_linear, flat, linear, linear_plus, outer_sum
from megatron_peft.runtime.precision import PRECISE, full_precision


def frozen_linear_plus_low_rank(
    x: Tensor, A: Tensor, B: Tensor, scale: float, call: FrozenLinearCall, mask: Tensor | None = None
) -> Tensor:
    """y = W x + s B (A (mask x)), unreduced.

    x: [s, b, in], or [s / t, b, in] where the sequence is split.
    A, B: [r, in], [out, r].
    mask: dropout of the branch's input, shaped like x.

    Returns [s, b, out].
    """
    return run_function(_LowRankLinear, x, A, B, scale, call, mask)


class _LowRankLinear(Function):
    @staticmethod
    @full_precision
    def forward(ctx, x, A, B, scale, call, mask):  # type: ignore[override]
        branch_input = x if mask is None else x * mask
        wait_u = start_narrow(branch_input, A, scale, call)
        x = whole_sequence(x, call)
        u = wait_u()
        ctx.save_for_backward(branch_input, u, A, B, mask)
        ctx.scale, ctx.call, ctx.trained = scale, call, (trained_factor(A), trained_factor(B))
        return linear_plus(x, call.weight, u, B, call.bias)

    @staticmethod
    @full_precision
    def backward(ctx, grad):  # type: ignore[override]
        branch_input, u, A, B, mask = ctx.saved_tensors
        du, wait_du = start_narrow_gradient(grad, B, ctx.scale, ctx.call)
        needs_x, needs_A, needs_B, *_ = ctx.needs_input_grad
        # dx starts its one wide collective here; the gradients of the factors are computed while it runs.
        wait_dx = start_summed_gradient(grad, ctx.call, du, A, mask) if needs_x else None
        trained_A, trained_B = ctx.trained
        # u carries the scale s already and, with the sequence split, the tokens of all ranks.
        dB = outer_sum(u, grad, gradient_dtype(trained_B)).t() if needs_B else None
        own_du = wait_du()
        # Where A is replicated (column-parallel) this is the rank's part of dA, summed once per step with the others.
        dA = outer_sum(own_du, branch_input, gradient_dtype(trained_A)) if needs_A else None
        dx = None if wait_dx is None else wait_dx(own_du)
        return dx, delivered(trained_A, dA), delivered(trained_B, dB), None, None, None


# The pieces of it, which a mixture with a rotation has too.


def start_narrow(x: Tensor, A: Tensor, scale: Any, call: FrozenLinearCall) -> Wait:
    """Begin u = s A x of the tokens of all ranks, [s, b, r]."""
    u = linear(x, A).mul_(scale)
    return start_gather_sequence_over_tensor_parallel(u, call.group) if call.splits_sequence else lambda: u


def start_narrow_gradient(grad: Tensor, B: Tensor, scale: Any, call: FrozenLinearCall) -> tuple[Tensor, Wait]:
    """(du = s g B of this rank's output features, a function that waits for that of its own tokens).

    du is a sum over the ranks' output features. With the sequence split, each rank needs that sum for its own tokens
    only: the r-wide reduce-scatter runs while dx is computed.
    """
    du = linear(grad, B.t()).mul_(scale)
    return du, start_sum_scatter_sequence_over_tensor_parallel(du, call.group) if call.splits_sequence else lambda: du


def start_summed_gradient(
    grad: Tensor, call: FrozenLinearCall, du: Tensor, A: Tensor, mask: Tensor | None
) -> Callable[[Tensor], Tensor]:
    """Begin dx = g W + mask (du A). Returns a function of the du of this rank's tokens: waits, and returns dx."""
    weight = call.weight
    if call.splits_sequence:
        wait = start_input_gradient(linear(grad, weight.t()), call)
        return lambda own_du: _add_branch(wait(), own_du, A, mask)
    if mask is None:
        dx = linear_plus(grad, weight.t(), du, A.t())
    else:
        dx = add_linear((du @ A).mul_(mask), grad, weight.t())
    wait = start_input_gradient(dx, call)
    return lambda own_du: wait()


def _add_branch(dx: Tensor, du: Tensor, A: Tensor, mask: Tensor | None) -> Tensor:
    """dx + mask (du A), in place where nothing has to be masked."""
    if mask is None:
        flat(dx).addmm_(flat(du), A)
        return dx
    return dx.addcmul_(mask, du @ A)


def trained_factor(factor: Any) -> Any:
    """The parameter whose gradient a factor's is, or begins with where a start is joined to it (`join_start`)."""
    return getattr(factor, "trained", factor)


def join_start(parameter: Tensor, start: Tensor, dim: int) -> Tensor:
    """The parameter and then its start, as one factor that knows whose gradient it has."""
    joined: Any = torch.cat([parameter, start], dim)
    joined.trained = parameter
    return joined


def gradient_dtype(factor: Any) -> torch.dtype:
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
