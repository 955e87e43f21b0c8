"""A frozen linear layer whose weight is rotated by a block-diagonal rotation: what BOFT, uRNN and the Hybrid share.

    output side (default):   W' = R W      y = R (W x)         input side:   W' = W R^T      y = W (R^T x)

R = diag(R_1, ..., R_k), contiguous groups of g features, so a rank applies its blocks with no communication at any
layout. Where the rotated side is split over the ranks (the output of a column-parallel layer, the input of a
row-parallel one) a rank holds its own blocks; otherwise it holds all of them, and a part of their gradient: that of
its own tokens. The bias is added after R: R rotates the weight. Blocks are built in float32.

Letters: s sequence, b batch, k blocks of g features a rank, K those of all layers of a pipeline stage.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from torch import Tensor, nn

from megatron_peft.adapters.blocks import (
    HeldBlocks,
    add_blocks,
    gradient_from_mixed_output,
    gradient_from_output,
    multiplier,
)
from megatron_peft.adapters.frozen_linear import FrozenLinearCall, frozen_linear, run_function
from megatron_peft.adapters.rotated_linear import frozen_linear_rotated, rotation_gradients
from megatron_peft.adapters.unitary import orthogonality_error
from megatron_peft.config import Side, require
from megatron_peft.config.methods.rotation import IS_ROTATION
from megatron_peft.parallel.collectives import gradient_of
from megatron_peft.parallel.layout import LinearLayout
from megatron_peft.runtime.precision import full_precision

# Blocks are built once a step (`step.py`) for all layers of a pipeline stage: D = R - I of all layers is one batched
# computation from the layers' parameters, concatenated. Each layer gets its share as a leaf of autograd's graph:
#
#     begin       D = changes_of(parameters of all layers); in a mixture (1 - lambda) D
#     backward    of each microbatch: total += g^T y, where dD = total (I + D); a mixture and a kept input differ below
#     end         dD of all layers, one backward from there to the parameters, and the parameters' own buffers

# What backward has beside the output's gradient (the output of an orthogonal R, the output of a mixture that has a low
# rank too, or R's own input) -> the gradient of D from the sums. A step's gradients come in this order, so that each
# formula takes one contiguous part of them.
FORMULAS = {
    "output": gradient_from_output,
    "mixed output": gradient_from_mixed_output,
    "input": lambda products, D: products,
}


@dataclass(frozen=True)
class AppliedRotation:
    """How one layer applies its rotation."""

    rotation: "BlockRotation"  # owns the parameter
    kept: Literal["output", "mixed output", "input"]  # for FORMULAS
    transposed: bool = False  # D^T is applied
    mix: Tensor | None = None  # lambda, a float32 scalar tensor: (1 - lambda) D is applied; None without a mixture
    scale: float = 1.0  # s of the low rank beside it


class RotatesOnceAStep:
    """An adapter with a rotation, whose blocks are built for a step."""

    held: HeldBlocks | None = None  # in a step, if R is applied as dense blocks

    def applied_rotation(self) -> AppliedRotation:
        """What has to be known of it."""
        raise NotImplementedError

    @staticmethod
    def begin_step(layers: Sequence[Any], is_training: bool) -> Sequence[HeldBlocks | None]:
        """The blocks of all layers: those of a kind and a type of activations together."""
        kinds: dict[Any, list[int]] = {}
        applied: list[AppliedRotation] = [layer.adapter.applied_rotation() for layer in layers]
        rounded = {str(each.rotation.trained.dtype) for each in applied} - {"torch.float32", "torch.float64"}
        message = f"rotations must be float32, not {', '.join(rounded)}: add the adapters after Float16Module."
        require(not rounded, message)
        for index, (rotated, layer) in enumerate(zip(applied, layers, strict=True)):
            if rotated.rotation.has_blocks:
                kinds.setdefault((type(rotated.rotation), rotated.transposed, layer.weight.dtype), []).append(index)
        blocks: list[HeldBlocks | None] = [None] * len(layers)
        for (_, _, dtype), indices in kinds.items():
            # A step's gradients come in the order of formulas.
            ordered = sorted(indices, key=lambda index: list(FORMULAS).index(applied[index].kept))
            stack = Stack([applied[index] for index in ordered], dtype, is_training)
            for index, held in zip(ordered, stack.build(), strict=True):
                blocks[index] = held
        return blocks

    @staticmethod
    def end_step(layers: Sequence[Any]) -> Sequence[nn.Parameter]:
        """Add the gradients of the rotations' parameters."""
        stacks = dict.fromkeys(held.stack for layer in layers if (held := layer.adapter.held) is not None)
        for stack in stacks:
            stack.add_gradients()
        return [layer.rotation.trained for stack in stacks for layer in stack.layers]


class BlockRotation(RotatesOnceAStep, nn.Module):
    """One adapted linear layer's rotation. Subclasses own the parameter and say what the blocks are."""

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
    def trained(self) -> nn.Parameter:
        """The one parameter, [k, ...]."""
        raise NotImplementedError

    def constants(self) -> tuple[Tensor, ...]:
        """What else the blocks depend on, each [k, ...]."""
        return ()

    @staticmethod
    def changes_of(trained: Tensor, *constants: Tensor) -> Tensor:
        """D = R - I, [k, g, g], of the groups of one layer or of several, whose tensors are concatenated."""
        raise NotImplementedError

    @property
    def has_blocks(self) -> bool:
        """Whether R is applied as dense blocks."""
        return True

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


class Stack:
    """Rotations of one kind, whose tensors concatenate, those of one formula after another; `dtype` of activations."""

    total: Tensor | None = None

    def __init__(self, layers: Sequence[AppliedRotation], dtype: torch.dtype, is_training: bool) -> None:
        self.layers = layers
        self.counts = [layer.rotation.num_local_groups for layer in self.layers]
        self.dtype, self.is_training = dtype, is_training

    def build(self) -> list[HeldBlocks]:
        """D of all layers: each layer's share of it."""
        self.trained = torch.cat([layer.rotation.trained.detach() for layer in self.layers])
        self.trained.requires_grad_(self.is_training)
        constants = zip(*(layer.rotation.constants() for layer in self.layers), strict=True)
        self.built = self.layers[0].rotation.changes_of(self.trained, *(torch.cat(tensors) for tensors in constants))
        scales = self._mix()
        if self.layers[0].transposed:
            self.built = self.built.transpose(1, 2)
        self.D = self.built.detach().contiguous()
        if self.is_training:
            self.total = torch.zeros_like(self.D)
        totals = self._shares(self.total) if self.total is not None else [None] * len(self.layers)
        shares = zip(self._shares(self.D), self._shares(multiplier(self.D, self.dtype)), totals, scales, strict=True)
        return [
            HeldBlocks(self, D.requires_grad_(self.is_training), own_multiplier, total, scale)
            for D, own_multiplier, total, scale in shares
        ]

    def _mix(self) -> Sequence[Tensor | None]:
        """Take (1 - lambda) D in a mixture. Returns lambda s of each layer's low rank."""
        mixes = [layer.mix for layer in self.layers if layer.mix is not None]
        if not mixes:
            return [None] * len(self.layers)
        mix = torch.stack(mixes)
        of_groups = torch.cat([x.expand(count) for x, count in zip((1 - mix).unbind(), self.counts, strict=True)])
        self.built = self.built * of_groups[:, None, None]
        return (mix * self.layers[0].scale).unbind()

    def _shares(self, stacked: Tensor) -> Sequence[Tensor]:  # [K, ...] -> [k, ...] of each layer, views
        return stacked.split(self.counts)

    def add_gradients(self) -> None:
        """Takes the sums of all microbatches to the gradients of the parameters."""
        assert self.total is not None
        parts, first = [], 0
        for kept, formula in FORMULAS.items():
            count = sum(k for layer, k in zip(self.layers, self.counts, strict=True) if layer.kept == kept)
            if count:
                groups = slice(first, first + count)
                parts.append(formula(self.total[groups], self.D[groups]))
                first += count
        dD = parts[0] if len(parts) == 1 else torch.cat(parts)
        (gradient,) = torch.autograd.grad(self.built, self.trained, dD)
        buffers = [gradient_of(layer.rotation.trained) for layer in self.layers]
        torch._foreach_add_(buffers, list(self._shares(gradient)))
