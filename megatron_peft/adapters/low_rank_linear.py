"""A frozen weight and a low rank beside it: y = W x + s B (A (m x)), m a mask of dropout.

    forward      u = s A (m x)     y = W x + B u
    backward     du = s g B        dx = g W + m (du A)     dA = du^T (m x)     dB = g^T u           with g = dy

The narrow products are accumulated onto the wide ones. Kept for backward are the rank's own x once, and the r-wide u; m
is drawn again. With the sequence split, u and du have collectives of their own, r wide, which run beside the wide ones.

Letters: s sequence, b batch, r rank, t tensor-parallel size; in and out are a rank's own.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
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


class Dropout:
    """The mask m of one product: drawn in forward, and again in backward from the state that its generator had then.

    p: of a zero; all else is 1 / (1 - p).
    fork: begins the context whose generator it is drawn from.
    """

    def __init__(self, p: float, fork: Callable[[], AbstractContextManager[Any]]) -> None:
        self._p, self._fork = p, fork

    def draw(self, x: Tensor) -> Tensor:
        """m, shaped like x."""
        self._generator = torch.cuda.default_generators[x.device.index] if x.is_cuda else torch.default_generator
        with self._fork():
            self._state = self._generator.get_state()  # a GPU's is in the host's memory too, a seed and an offset
            mask = F.dropout(torch.ones_like(x), self._p)
        self._like = {"size": mask.shape, "stride": mask.stride(), "dtype": mask.dtype, "device": mask.device}
        return mask

    def draw_again(self) -> Tensor:
        """The same m. Its generator goes on as if this had not been."""
        now = self._generator.get_state()
        self._generator.set_state(self._state)
        mask = F.dropout(torch.empty_strided(**self._like).fill_(1), self._p)
        self._generator.set_state(now)
        return mask


def masked(x: Tensor, mask: Tensor | None) -> Tensor:
    """m x."""
    return x if mask is None else x * mask


def frozen_linear_plus_low_rank(
    x: Tensor, A: Tensor, B: Tensor, scale: float, call: FrozenLinearCall, dropout: Dropout | None = None
) -> Tensor:
    """y = W x + s B (A (m x)), unreduced.

    x: [s, b, in], or [s / t, b, in] where the sequence is split.
    A, B: [r, in], [out, r].
    dropout: of the branch's input.

    Returns [s, b, out].
    """
    return run_function(_LowRankLinear, x, A, B, scale, call, dropout)


class _LowRankLinear(Function):
    @staticmethod
    @full_precision
    def forward(ctx, x, A, B, scale, call, dropout):  # type: ignore[override]
        wait_u = start_narrow(masked(x, dropout and dropout.draw(x)), A, scale, call)
        whole_x = whole_sequence(x, call)
        u = wait_u()
        ctx.save_for_backward(x, u, A, B)
        ctx.scale, ctx.call, ctx.dropout, ctx.trained = scale, call, dropout, (trained_factor(A), trained_factor(B))
        return linear_plus(whole_x, call.weight, u, B, call.bias)

    @staticmethod
    @full_precision
    def backward(ctx, grad):  # type: ignore[override]
        x, u, A, B = ctx.saved_tensors
        du, wait_du = start_narrow_gradient(grad, B, ctx.scale, ctx.call)
        mask = ctx.dropout and ctx.dropout.draw_again()
        needs_x, needs_A, needs_B, *_ = ctx.needs_input_grad
        # dx starts its one wide collective here; the gradients of the factors are computed while it runs.
        wait_dx = start_summed_gradient(grad, ctx.call, du, A, mask) if needs_x else None
        trained_A, trained_B = ctx.trained
        # u carries the scale s already and, with the sequence split, the tokens of all ranks.
        dB = outer_sum(u, grad, gradient_dtype(trained_B)).t() if needs_B else None
        own_du = wait_du()
        # Where A is replicated (column-parallel) this is the rank's part of dA, summed once per step with the others.
        dA = outer_sum(own_du, masked(x, mask), gradient_dtype(trained_A)) if needs_A else None
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
