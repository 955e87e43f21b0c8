"""A frozen linear layer whose weight is rotated by a block-diagonal rotation: what BOFT and uRNN share.

    output side (default):   W' = R W      y = R (W x)         input side:   W' = W R^T      y = W (R^T x)

R = diag(R_1, ..., R_k), contiguous groups of g features, so a rank applies its blocks with no communication at any
layout. Where the rotated side is split over the ranks (the output of a column-parallel layer, the input of a
row-parallel one) a rank holds its own blocks; otherwise it holds all of them, and a part of their gradient: that of
its own tokens. The bias is added after R: R rotates the weight. Blocks are built in float32.

Letters: s sequence, b batch, t tensor-parallel size, k blocks a rank, g features of a block.
"""

from dataclasses import replace

import torch
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from torch import Tensor, nn

from megatron_peft.adapters.blocks import HeldBlocks, add_blocks
from megatron_peft.adapters.frozen_linear import FrozenLinearCall, frozen_linear, run_function
from megatron_peft.adapters.rotated_linear import frozen_linear_rotated, rotation_gradients
from megatron_peft.adapters.step_rotations import AppliedRotation, RotatesOnceAStep, Rotation
from megatron_peft.adapters.unitary import orthogonality_error
from megatron_peft.config import Side
from megatron_peft.config.methods.rotation import IS_ROTATION
from megatron_peft.parallel.layout import LinearLayout
from megatron_peft.runtime.precision import full_precision


class BlockRotation(RotatesOnceAStep, Rotation):
    """One adapted linear layer's rotation.

    Args:
        layout: of the base weight.
        side: which side of W is rotated.
        group_size: g.
    """

    def __init__(self, layout: LinearLayout, side: Side, group_size: int) -> None:
        super().__init__()
        self.layout, self.group_size = layout, group_size
        self.side: Side = side

    def mark_rotation(self, parameter: nn.Parameter) -> None:
        """How a parameter over the rank's groups, [k, ...], lies on the ranks; it is never decayed, since the identity
        need not be at zero, and has a learning rate of its own."""
        self.layout.mark_groups(self.side, parameter)
        setattr(parameter, IS_ROTATION, True)

    @property
    def num_local_groups(self) -> int:
        """k."""
        parts = self.layout.num_parts if self.side == "output" else 1
        return parts * self.layout.num_local_features(self.side) // self.group_size

    @full_precision
    def changes(self) -> Tensor:
        """D = R - I, [k, g, g] in float32, differentiable in the parameters."""
        if torch.is_grad_enabled() and self.trained.requires_grad:
            return _Changes.apply(self.trained, self.changes_of, *self.constants())  # pyright: ignore[reportReturnType]
        return self.changes_of(self.trained, *self.constants())

    def applied_rotation(self) -> AppliedRotation:
        return AppliedRotation(self, "output", transposed=self.side == "input")

    def applied(self) -> Tensor:
        """The blocks that the forward applies: D, or D^T where the input is rotated."""
        if self.held is not None:
            return self.held.D
        return self.changes() if self.side == "output" else self.changes().transpose(1, 2)

    @full_precision
    def orthogonality_error(self) -> Tensor:
        """Largest entry of |R^T R - I|, a scalar."""
        D = self.changes()
        return orthogonality_error(D + torch.eye(self.group_size, dtype=D.dtype, device=D.device))

    def restart(self) -> None:
        """Back to R = I."""
        raise NotImplementedError

    def forward(self, x: Tensor, call: FrozenLinearCall) -> Tensor:  # [s, b, in] -> [s, b, out]
        """y = R W x, or W R^T x."""
        return self.rotate_output(x, call) if self.side == "output" else self.rotate_input(x, call)

    def rotate_output(self, x: Tensor, call: FrozenLinearCall) -> Tensor:
        """y = R (W x)."""
        if call.needs_no_sum:
            return frozen_linear_rotated(x, self.applied(), call, self.held)
        z = call.reduce(frozen_linear(x, call))
        return rotate(z, self.applied(), call.own_tokens(z.shape[0] * z.shape[1]), self.held)

    def rotate_input(self, x: Tensor, call: FrozenLinearCall) -> Tensor:
        """y = W (R^T x)."""
        if call.sums_input_gradient:  # x is whole on every rank: its gradient is summed once, in front of R
            x = copy_to_tensor_model_parallel_region(x, group=call.group)
            if x.requires_grad:  # megatron-core's sum gives a gradient that is not contiguous back as it was
                x.register_hook(lambda grad: grad.contiguous())
            call = replace(call, sums_input_gradient=False)
        return call.reduce(frozen_linear(self.rotated_by_transpose(x), call))

    def rotated_by_transpose(self, x: Tensor) -> Tensor:
        """R^T x."""
        return rotate(x, self.applied(), held=self.held)


class _Changes(torch.autograd.Function):
    """D of one layer, whose backward too runs in full precision: autograd would run it under the program's settings."""

    @staticmethod
    def forward(ctx, trained, changes_of, *constants):  # type: ignore[override]
        with torch.enable_grad():
            ctx.trained = trained.detach().requires_grad_()
            ctx.built = changes_of(ctx.trained, *constants)
        ctx.num_constants = len(constants)
        return ctx.built.detach()

    @staticmethod
    @full_precision
    def backward(ctx, grad):  # type: ignore[override]
        (gradient,) = torch.autograd.grad(ctx.built, ctx.trained, grad, retain_graph=True)
        return gradient, None, *(None,) * ctx.num_constants


def rotate_weight(weight: Tensor, R: Tensor, side: Side) -> Tensor:  # [out, in], [k, g, g] -> [out, in]
    """R W, or W R^T, in the weight's type."""
    R = R.to(weight.dtype)
    if side == "output":
        return torch.bmm(R, weight.view(*R.shape[:2], -1)).view_as(weight)
    return torch.einsum("okg,khg->okh", weight.view(-1, *R.shape[:2]), R).reshape(weight.shape)


def rotate(
    z: Tensor, D: Tensor, tokens: slice = slice(None), held: HeldBlocks | None = None
) -> Tensor:  # -> [s, b, k g]
    """y = z + diag(D) z for an orthogonal R = I + D. Keeps y, which gives z back.

    Args:
        z: [s, b, k g].
        D: [k, g, g].
        tokens: rows of the flattened tokens over which this rank forms the gradient of D.
        held: of D, where it was built for the whole step.
    """
    return run_function(_Rotate, z, D, tokens, held)


class _Rotate(torch.autograd.Function):
    @staticmethod
    @full_precision
    def forward(ctx, z, D, tokens, held):  # type: ignore[override]
        y = add_blocks(z, D, held and held.multiplier)
        ctx.save_for_backward(y, D)
        ctx.tokens, ctx.held = tokens, held
        return y

    @staticmethod
    @full_precision
    def backward(ctx, grad):  # type: ignore[override]
        y, D = ctx.saved_tensors
        return *rotation_gradients(grad, D, y, kept_is_output=True, tokens=ctx.tokens, held=ctx.held), None, None
