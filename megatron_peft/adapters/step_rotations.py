"""The blocks of rotations, built once a step for all layers of a pipeline stage.

D = R - I depends on weights only, but a step has many microbatches, and activation recompute runs each forward twice.
So D of all layers is built in one batched computation before the first microbatch, from the layers' parameters,
concatenated. Each layer gets its share as a leaf of autograd's graph:

    build       D = changes_of(parameters of all layers); in a mixture (1 - lambda) D
    backward    of each microbatch: total += g^T y, where dD = total (I + D); a mixture and a kept input differ below
    finish      dD of all layers, one backward from there to the parameters, and the parameters' own buffers

`finish` stands before megatron-core's sums of gradients, so data parallelism, the distributed optimizer and clipping
see what they would see without it. Without a build, a layer builds its D in each forward, as LoRA-GA's start does.

Letters: k groups of g features of one layer, K those of all layers.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor, nn

from megatron_peft.adapters.blocks import HeldBlocks, gradient_from_mixed_output, gradient_from_output, multiplier
from megatron_peft.adapters.rotation import AppliedRotation
from megatron_peft.parallel.collectives import gradient_of
from megatron_peft.runtime.precision import full_precision

# A step's gradients come in this order, so that each formula takes one contiguous part of them.
FORMULAS = {
    "output": gradient_from_output,
    "mixed output": gradient_from_mixed_output,
    "input": lambda products, D: products,
}


class StepRotations:
    """The rotations of a stage's layers, and their blocks for one step.

    Args:
        model_chunks: of this rank, wrapped for data parallelism or bare.
        is_training: gradients are wanted.
    """

    def __init__(self, model_chunks: Sequence[nn.Module], is_training: bool = True) -> None:
        self.model_chunks, self.is_training = model_chunks, is_training
        kinds: dict[Any, list[AppliedRotation]] = {}
        for applied, dtype in _applied_rotations(model_chunks):
            kinds.setdefault((type(applied.rotation), applied.transposed, dtype), []).append(applied)
        self.stacks = [_Stack(layers, dtype, is_training) for (_, _, dtype), layers in kinds.items()]

    @full_precision
    def build(self) -> None:
        """Build the blocks of every layer from its parameters as they are now."""
        self._gather_parameters()
        with torch.set_grad_enabled(self.is_training):
            for stack in self.stacks:
                stack.build()

    def _gather_parameters(self) -> None:
        """Wait for --overlap-param-gather, which gathers a module's parameters when its forward begins."""
        rotations = {one.rotation for stack in self.stacks for one in stack.layers}
        wrapped = [chunk for chunk in self.model_chunks if isinstance(chunk, DistributedDataParallel)]
        for chunk in wrapped:
            if not chunk.remove_forward_pre_hook_handles:  # parameters are whole
                continue
            gather = chunk._make_forward_pre_hook()
            for module in (one for one in chunk.modules() if one in rotations):  # every rank in the same order
                gather(module)

    @full_precision
    def finish(self, model_chunks: Sequence[nn.Module]) -> None:
        """Add the step's gradients to the parameters' buffers, and report them as ready to the chunks' wrappers."""
        for stack in self.stacks:
            stack.add_gradients()
        for chunk in model_chunks:
            if isinstance(chunk, DistributedDataParallel) and chunk.ddp_config.overlap_grad_reduce:
                self._report_ready(chunk)

    def _report_ready(self, chunk: DistributedDataParallel) -> None:
        """What the hook of megatron-core does after the backward of a parameter, which here is none of autograd's."""
        for parameter in (one.rotation.trained for stack in self.stacks for one in stack.layers):
            if parameter in chunk.param_to_bucket_group:
                chunk.param_to_bucket_group[parameter].register_grad_ready(parameter, chunk.force_all_reduce)

    def clear(self) -> None:
        """Forget the blocks: they are of weights that will change. No memory of theirs is left."""
        for stack in self.stacks:
            stack.clear()
        self.stacks = []


@contextmanager
def step_rotations(model_chunks: Sequence[nn.Module]) -> Iterator[StepRotations]:
    """Blocks for the microbatches of a training step. Call `finish` of what it yields after the last backward."""
    rotations = StepRotations(model_chunks)
    try:
        rotations.build()
        yield rotations
    finally:
        rotations.clear()


@contextmanager
def inference_rotations(model_chunks: Sequence[nn.Module]) -> Iterator[None]:
    """Blocks for as long as weights stay what they are: validation, scoring, generation."""
    rotations = StepRotations(model_chunks, is_training=False)
    try:
        rotations.build()
        yield
    finally:
        rotations.clear()


def _applied_rotations(model_chunks: Sequence[nn.Module]) -> Iterator[tuple[AppliedRotation, torch.dtype]]:
    """The rotations applied as blocks, each with the dtype of its layer's activations."""
    for chunk in model_chunks:
        for module in chunk.modules():
            applied = getattr(getattr(module, "adapter", None), "applied_rotation", None)
            if applied is not None and applied().rotation.has_blocks:
                weight: Any = module.weight
                yield applied(), weight.dtype


class _Stack:
    """Rotations of one kind, whose tensors concatenate.

    Args:
        layers: in any order.
        dtype: of their activations.
        is_training: gradients are wanted.
    """

    total: Tensor | None = None

    def __init__(self, layers: Sequence[AppliedRotation], dtype: torch.dtype, is_training: bool) -> None:
        self.layers = sorted(layers, key=lambda one: list(FORMULAS).index(one.kept))
        self.counts = [one.rotation.num_local_groups for one in self.layers]
        self.dtype, self.is_training = dtype, is_training

    def build(self) -> None:
        """D of all layers, and each layer's share of it."""
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
        for one, (D, own_multiplier, total, scale) in zip(self.layers, shares, strict=True):
            one.rotation.held = HeldBlocks(D.requires_grad_(self.is_training), own_multiplier, total, scale)

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
        """From the sums of all microbatches to the gradients of the parameters."""
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

    def clear(self) -> None:
        """Forget the blocks."""
        for one in self.layers:
            one.rotation.held = None
