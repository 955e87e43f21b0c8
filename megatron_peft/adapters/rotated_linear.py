"""A frozen weight and a rotation of its output: y = R z, z = W x, R = I + diag(D) orthogonal.

    backward     dz = R^T g     dx = dz W     dD = g^T z = (g^T y) R                                 with g = dy

z is not kept: y, which the next operation often keeps anyway, gives it back. At as many tokens as W has columns, or
more, the rotation goes into the weight for the moment of the product: (R W) x.

Letters: s sequence, b batch, k blocks of g features; in and out are a rank's own.
"""

from typing import Any

import torch
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
from megatron_peft.adapters.frozen_linear import FrozenLinearCall, run_function, start_input_gradient, whole_sequence
from megatron_peft.runtime.cpu_kernels import flat, linear
from megatron_peft.runtime.precision import PRECISE, full_precision


def frozen_linear_rotated(x: Tensor, D: Tensor, call: FrozenLinearCall, held: HeldBlocks | None = None) -> Tensor:
    """y = R W x with R = I + diag(D) orthogonal, D [k, g, g]; for outputs that need no reduction."""
    return run_function(_RotatedLinear, x, D, call, held)


class _RotatedLinear(Function):
    @staticmethod
    @full_precision
    def forward(ctx, x, D, call, held):  # type: ignore[override]
        x = whole_sequence(x, call)
        weight = call.weight
        ctx.rotates_weight = rotates_weight(x, weight, D)
        if ctx.rotates_weight:
            y = linear(x, rotated_weight(weight, D, held))
        else:
            y = add_blocks(linear(x, weight), D, held and held.multiplier)
        ctx.save_for_backward(D, y)
        ctx.call, ctx.held = call, held
        return y if call.bias is None else y + call.bias

    @staticmethod
    @full_precision
    def backward(ctx, grad):  # type: ignore[override]
        (D, y), call, wait_dx = ctx.saved_tensors, ctx.call, None
        if ctx.needs_input_grad[0]:  # its one wide collective runs while dD is computed
            if ctx.rotates_weight:
                dx = linear(grad, rotated_weight(call.weight, D, ctx.held).t())
            else:
                dx = linear(unrotated(grad, D, ctx.held), call.weight.t())
            wait_dx = start_input_gradient(dx, call)
        dD = changes_gradient(grad, y, D, None, None, ctx.held)
        return None if wait_dx is None else wait_dx(), dD, None, None


def rotates_weight(x: Tensor, weight: Tensor, D: Tensor) -> bool:
    """Whether the rotation goes into W for the moment of a product, y = (W + D W) x.

    At as many tokens as W has columns, or more, rotating W costs less than rotating z. The rotated weight, formed in
    forward and again in backward, is no larger than z and never kept. Not in a low precision, where rounding W + dW
    would lose a small change.
    """
    return D.dtype == weight.dtype in PRECISE and x[..., 0].numel() >= weight.shape[1]


def rotated_weight(weight: Tensor, D: Tensor, held: HeldBlocks | None = None) -> Tensor:  # -> [out, in]
    """W + D W, this rank's slice: a copy."""
    R = D + identity_like(D) if held is None else held.multiplier
    return torch.bmm(R, weight.view(*R.shape[:2], -1)).view_as(weight)


def rotation_gradients(
    grad: Tensor,
    D: Tensor,
    kept: Tensor,
    kept_is_output: bool,
    tokens: slice = slice(None),
    held: HeldBlocks | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(dz, dD) of y = z + diag(D) z; no dD where the step's total takes it.

    grad: dy, [s, b, k g].
    D: [k, g, g].
    kept: y of an orthogonal R = I + D, for which dD = g^T z = (g^T y) R; or z.
    tokens: rows of the flattened tokens that dD is summed over.
    held: of D, where it was built for the whole step.
    """
    grad_z = unrotated(grad, D, held)
    own_grad, own_kept = flat(grad)[tokens], flat(kept)[tokens]
    if held is not None or kept_is_output:
        return grad_z, changes_gradient(own_grad, own_kept, D, None, None, held)
    return grad_z, blocks_gradient(own_grad, own_kept, D)


def unrotated(grad: Tensor, D: Tensor, held: HeldBlocks | None) -> Tensor:
    """dz = (I + D)^T g."""
    return add_blocks(grad, D.transpose(1, 2), None if held is None else held.multiplier.transpose(1, 2))


def changes_gradient(
    grad: Tensor, kept: Tensor, D: Tensor, dB: Tensor | None, B: Any, held: HeldBlocks | None
) -> Tensor | None:  # -> [k, g, g]
    """dD of one microbatch; None where `held` sums it up and the constant factor comes once a step."""
    if held is not None:
        return held.accumulate(grad, kept, dB, B)
    products = blocks_gradient(grad, kept, D)
    if dB is None:
        return gradient_from_output(products, D)
    return gradient_from_mixed_output(products.baddbmm_(*by_block(dB, B, D), alpha=-1), D)
