"""A frozen weight beside a low rank and a rotation: y = z + D z + s B (A (m x)), z = W x, m a mask of dropout.

    forward      u = s A (m x)       y = z + D z + B u
    backward     du = s g B          dz = (I + D)^T g     dx = dz W + m (du A)                       with g = dy
                 dA = du^T (m x)     dB = g^T u           dD = g^T z

Where ranks sum the output, D acts on the whole z, so that the r-wide A x is summed apart from it, and z is kept in the
place of y.

Letters: s sequence, b batch, r rank, k blocks of g features; in and out are a rank's own.
"""

from torch import Tensor
from torch.autograd import Function

from megatron_peft.adapters.blocks import HeldBlocks, add_blocks
from megatron_peft.adapters.frozen_linear import (
    FrozenLinearCall,
    frozen_linear,
    producer_of,
    recompute,
    run_function,
    start_input_gradient,
    whole_sequence,
)
from megatron_peft.adapters.low_rank_linear import (
    delivered,
    gradient_dtype,
    start_narrow,
    start_narrow_gradient,
    start_summed_gradient,
    trained_factor,
)
from megatron_peft.adapters.rotated_linear import (
    changes_gradient,
    rotated_weight,
    rotates_weight,
    rotation_gradients,
    unrotated,
)
from megatron_peft.runtime.cpu_kernels import flat, linear, outer_sum
from megatron_peft.runtime.precision import full_precision


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
        return run_function(_MixedLinear, x, A, B, D, scale, call, mask, producer, held)
    z = call.reduce(frozen_linear(x, call))
    u = call.reduce(run_function(_NarrowProduct, x if mask is None else x * mask, A, producer))
    return run_function(_MixReduced, z, u, B, D, scale, call.own_tokens(z.shape[0] * z.shape[1]), held)


class _MixedLinear(Function):
    @staticmethod
    @full_precision
    def forward(ctx, x, A, B, D, scale, call, mask, producer, held):  # type: ignore[override]
        branch_input = x if mask is None else x * mask
        wait_u = start_narrow(branch_input, A, scale, call)
        x = whole_sequence(x, call)
        u = wait_u()
        ctx.changes_weight = mask is None and rotates_weight(x, call.weight, D)
        if ctx.changes_weight:
            y = linear(x, changed_weight(call.weight, A, B, D, scale, held))
        else:
            y = add_blocks(linear(x, call.weight), D, held and held.multiplier)
            flat(y).addmm_(flat(u), B.t())
        ctx.save_for_backward(branch_input if producer is None else None, u, A, B, D, call.weight, mask, y)
        ctx.scale, ctx.call, ctx.producer, ctx.held = scale, call, producer, held
        ctx.trained = trained_factor(A), trained_factor(B)
        return y if call.bias is None else y + call.bias

    @staticmethod
    @full_precision
    def backward(ctx, grad):  # type: ignore[override]
        branch_input, u, A, B, D, weight, mask, y = ctx.saved_tensors
        call, wait_dx = ctx.call, None
        du, wait_du = start_narrow_gradient(grad, B, ctx.scale, call)
        needs_x, needs_A, needs_B, *_ = ctx.needs_input_grad
        if needs_x and ctx.changes_weight:  # the low rank is in the weight
            changed = changed_weight(weight, A, B, D, ctx.scale, ctx.held)
            wait_whole_dx = start_input_gradient(linear(grad, changed.t()), call)
            wait_dx = lambda own_du: wait_whole_dx()  # noqa: E731
        elif needs_x:
            wait_dx = start_summed_gradient(unrotated(grad, D, ctx.held), weight, call, du, A, mask)
        trained_A, trained_B = ctx.trained
        dB = outer_sum(u, grad, gradient_dtype(trained_B)).t() if needs_B else None
        own_du = wait_du()
        if ctx.producer is not None:
            branch_input = recompute(ctx.producer)
        dA = outer_sum(own_du, branch_input, gradient_dtype(trained_A)) if needs_A else None
        dD = changes_gradient(grad, y, D, dB, B, ctx.held)
        dx = None if wait_dx is None else wait_dx(own_du)
        return dx, delivered(trained_A, dA), delivered(trained_B, dB), dD, None, None, None, None, None


def changed_weight(
    weight: Tensor, A: Tensor, B: Tensor, D: Tensor, scale: Tensor, held: HeldBlocks | None = None
) -> Tensor:  # -> [out, in]
    """W + D W + scale B A, this rank's slice: a copy."""
    return rotated_weight(weight, D, held).addmm_(B, A * scale)


# Where ranks sum the output.


class _NarrowProduct(Function):
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
        dA = outer_sum(grad, recompute(ctx.producer) if x is None else x, gradient_dtype(ctx.trained))
        return linear(grad, A.t()), delivered(ctx.trained, dA), None


class _MixReduced(Function):
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
        dB = outer_sum(flat(u)[ctx.tokens], flat(grad)[ctx.tokens], gradient_dtype(ctx.trained)).t()
        return dz, linear(grad, B.t()).mul_(ctx.scale), delivered(ctx.trained, dB), dD, None, None, None
