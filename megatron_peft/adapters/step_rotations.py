"""The blocks of rotations, built once a step (`step.py`) for all layers of a pipeline stage.

Activation recompute runs each forward twice, too. D = R - I of all layers is built in one batched computation, from the
layers' parameters, concatenated. Each layer gets its share as a leaf of autograd's graph:

    begin       D = changes_of(parameters of all layers); in a mixture (1 - lambda) D
    backward    of each microbatch: total += g^T y, where dD = total (I + D); a mixture and a kept input differ below
    end         dD of all layers, one backward from there to the parameters, and the parameters' own buffers

Letters: k groups of g features of one layer, K those of all layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from megatron_peft.adapters.blocks import HeldBlocks, gradient_from_mixed_output, gradient_from_output, multiplier
from megatron_peft.parallel.collectives import gradient_of

# A step's gradients come in this order, so that each formula takes one contiguous part of them.
FORMULAS = {
    "output": gradient_from_output,
    "mixed output": gradient_from_mixed_output,
    "input": lambda products, D: products,
}


class Rotation(nn.Module):
    """What D = R - I of k groups is built from. Subclasses own the parameter and say what the blocks are."""

    @property
    def trained(self) -> nn.Parameter:
        """The one parameter, [k, ...]."""
        raise NotImplementedError

    @property
    def num_local_groups(self) -> int:
        """k."""
        raise NotImplementedError

    @property
    def has_blocks(self) -> bool:
        """Whether R is applied as dense blocks."""
        return True

    def constants(self) -> tuple[Tensor, ...]:
        """What else the blocks depend on, each [k, ...]."""
        return ()

    @staticmethod
    def changes_of(trained: Tensor, *constants: Tensor) -> Tensor:
        """D = R - I, [k, g, g], of the groups of one layer or of several, whose tensors are concatenated."""
        raise NotImplementedError


@dataclass(frozen=True)
class AppliedRotation:
    """How one layer applies its rotation.

    Args:
        rotation: owns the parameter.
        kept: what backward has beside the output's gradient: the output of an orthogonal R, the output of a mixture
            that has a low rank too, or R's own input. It decides how the gradient of D follows from the sums.
        transposed: D^T is applied.
        mix: lambda, a float32 scalar tensor: (1 - lambda) D is applied. None without a mixture.
        scale: s of the low rank beside it.
    """

    rotation: Rotation
    kept: Literal["output", "mixed output", "input"]
    transposed: bool = False
    mix: Tensor | None = None
    scale: float = 1.0


class RotatesOnceAStep:
    """An adapter with a rotation, whose blocks are built for a step.

    Attributes:
        held: its blocks in a step; None outside of one, or if R is not applied as dense blocks.
    """

    held: HeldBlocks | None = None

    def applied_rotation(self) -> AppliedRotation:
        """What has to be known of it."""
        raise NotImplementedError

    @staticmethod
    def begin_step(layers: Sequence[Any], is_training: bool) -> Sequence[HeldBlocks | None]:
        """The blocks of all layers: those of a kind and a type of activations together."""
        kinds: dict[Any, list[int]] = {}
        applied: list[AppliedRotation] = [layer.adapter.applied_rotation() for layer in layers]
        for index, (one, layer) in enumerate(zip(applied, layers, strict=True)):
            if one.rotation.has_blocks:
                kinds.setdefault((type(one.rotation), one.transposed, layer.weight.dtype), []).append(index)
        found: list[HeldBlocks | None] = [None] * len(layers)
        for (_, _, dtype), indices in kinds.items():
            # A step's gradients come in the order of formulas.
            ordered = sorted(indices, key=lambda index: list(FORMULAS).index(applied[index].kept))
            stack = Stack([applied[index] for index in ordered], dtype, is_training)
            for index, held in zip(ordered, stack.build(), strict=True):
                found[index] = held
        return found

    @staticmethod
    def end_step(layers: Sequence[Any]) -> Sequence[nn.Parameter]:
        """Add the gradients of the rotations' parameters."""
        stacks = dict.fromkeys(held.stack for layer in layers if (held := layer.adapter.held) is not None)
        for stack in stacks:
            stack.add_gradients()
        return [one.rotation.trained for stack in stacks for one in stack.layers]


class Stack:
    """Rotations of one kind, whose tensors concatenate.

    Args:
        layers: those of one formula after another.
        dtype: of their activations.
        is_training: gradients are wanted.
    """

    total: Tensor | None = None

    def __init__(self, layers: Sequence[AppliedRotation], dtype: torch.dtype, is_training: bool) -> None:
        self.layers = layers
        self.counts = [one.rotation.num_local_groups for one in self.layers]
        self.dtype, self.is_training = dtype, is_training

    def build(self) -> list[HeldBlocks]:
        """D of all layers: each layer's share of it."""
        self.trained = torch.cat([one.rotation.trained.detach() for one in self.layers])
        self.trained.requires_grad_(self.is_training)
        constants = zip(*(one.rotation.constants() for one in self.layers), strict=True)
        self.built = self.layers[0].rotation.changes_of(self.trained, *(torch.cat(one) for one in constants))
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
        mixes = [one.mix for one in self.layers if one.mix is not None]
        if not mixes:
            return [None] * len(self.layers)
        mix = torch.stack(mixes)
        of_groups = torch.cat([one.expand(count) for one, count in zip((1 - mix).unbind(), self.counts, strict=True)])
        self.built = self.built * of_groups[:, None, None]
        return (mix * self.layers[0].scale).unbind()

    def _shares(self, stacked: Tensor) -> Sequence[Tensor]:  # [K, ...] -> [k, ...] of each layer, views
        return stacked.split(self.counts)

    def add_gradients(self) -> None:
        """Takes the sums of all microbatches to the gradients of the parameters."""
        assert self.total is not None
        parts, first = [], 0
        for kept, formula in FORMULAS.items():
            count = sum(k for one, k in zip(self.layers, self.counts, strict=True) if one.kept == kept)
            if count:
                groups = slice(first, first + count)
                parts.append(formula(self.total[groups], self.D[groups]))
                first += count
        dD = parts[0] if len(parts) == 1 else torch.cat(parts)
        (gradient,) = torch.autograd.grad(self.built, self.trained, dD)
        buffers = [gradient_of(one.rotation.trained) for one in self.layers]
        torch._foreach_add_(buffers, list(self._shares(gradient)))
