"""The Hybrid (Algorithm 2): LoRA-GA's low rank and BOFT's rotation in one layer, mixed by lambda.

    y = z + lambda s B (A x) + (1 - lambda) (R - I) z,   z = W x

lambda is a number a layer, from the norms of the gradients of the two parts. The paper adds this change to W at every
step, which would apply it again and again; W stays frozen here and the change is added once. I + (1 - lambda)(R - I) is
not orthogonal, but it has an inverse, so backward can keep y.

Letters: s sequence, b batch, r rank, k blocks of g features; in and out are a rank's own.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function

from megatron_peft.adapters import boft, urnn
from megatron_peft.adapters.blocks import HeldBlocks, add_blocks
from megatron_peft.adapters.change import MixedChange, RotationChange, StoredTensors
from megatron_peft.adapters.frozen_linear import (
    FrozenLinearCall,
    frozen_linear,
    producer_of,
    recompute,
    run_function,
    start_input_gradient,
    whole_sequence,
)
from megatron_peft.adapters.low_rank import LowRank, add_low_rank, scaled_product
from megatron_peft.adapters.low_rank_linear import (
    Dropout,
    delivered,
    gradient_dtype,
    masked,
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
from megatron_peft.adapters.rotation import AppliedRotation, RotatesOnceAStep, rotate_weight
from megatron_peft.config import PeftConfig, require
from megatron_peft.config.methods.hybrid import rotation_lr, rotation_options
from megatron_peft.parallel.collectives import sum_coalesced
from megatron_peft.parallel.layout import LinearLayout, mark_split
from megatron_peft.runtime.cpu_kernels import flat, linear, outer_sum
from megatron_peft.runtime.precision import full_precision

ROTATIONS = {"boft": (boft.build, boft.rotation), "urnn": (urnn.urnn_rotation, urnn.rotation)}


class Hybrid(RotatesOnceAStep, nn.Module):
    """The two parts of one adapted linear layer and their mixture."""

    mix: Tensor  # lambda, a float32 scalar in the checkpoint
    num_kept: Tensor  # steps in which a gradient's norm was not finite, so that lambda kept its value
    # The base's weight with changes merged into it (`--hybrid-merge-interval`), or None; a key of checkpoints.
    folded_weight: Tensor | None

    def __init__(self, layout: LinearLayout, peft: PeftConfig, name: str, seed: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.layout = layout
        self.low_rank = LowRank(layout, peft, f"{name}.low_rank", seed, dtype)
        build_rotation, _ = ROTATIONS[peft.hybrid_rotation]
        self.rotation = build_rotation(layout, rotation_options(peft), name, seed, dtype)
        self.initial_mix = peft.initial_mix
        self.merges = peft.hybrid_merge_interval is not None
        device = torch.cuda.current_device()
        self.register_buffer("mix", torch.tensor(peft.initial_mix, device=device))
        self.register_buffer("num_kept", torch.tensor(0, device=device), persistent=False)
        self.register_buffer("folded_weight", None)

    takes_quantized_weight = True  # which none is where it merges into it

    def bind_weight(self, weight: Tensor) -> None:
        """Put the layer's weight into the checkpoint where --hybrid-merge-interval merges changes into it."""
        if self.merges:
            message = f"--hybrid-merge-interval merges changes into weights, which must be float32, not {weight.dtype}."
            require(weight.dtype == torch.float32, message)
            # the buffer is a view of the base's own tensor, so a loaded checkpoint loads it
            self.folded_weight = weight.detach()
            mark_split(self.folded_weight, weight.partition_dim, weight.partition_stride)  # pyright: ignore[reportAttributeAccessIssue]

    @torch.no_grad()
    @full_precision
    def merge_and_restart(self) -> None:
        """W <- W + lambda s (B A) + (1 - lambda) (R - I) W, this rank's slice; the parts start again at no change."""
        assert self.folded_weight is not None
        scale, D = self._mixture()
        weight = self.folded_weight
        weight.copy_(changed_weight(weight, *self.low_rank.factors(), D, scale))
        self.low_rank.restart()
        self.rotation.restart()

    def trained_parts(self) -> Iterator[tuple[str, nn.Module]]:
        """(what to call it, module) of the parts that have a gradient: not one that a fixed lambda switches off."""
        if self.initial_mix > 0:
            yield " (its low rank)", self.low_rank
        if self.initial_mix < 1:
            yield " (its rotation)", self.rotation

    @staticmethod
    def update_mixtures(
        adapters: Sequence["Hybrid"], peft: PeftConfig, own_gradient: "OwnGradient", group: dist.ProcessGroup, lr: float
    ) -> None:
        """`update_mixtures` with --lr, of which the rates of rotations follow."""
        update_mixtures(adapters, peft, own_gradient, group, rotation_lr(peft, lr) / lr)

    def applied_rotation(self) -> AppliedRotation:
        whole = self.layout.split == "column" or self.layout.group.size() == 1  # no sum between W x and R
        kept = "mixed output" if whole else "input"
        return AppliedRotation(self.rotation, kept, mix=self.mix, scale=self.low_rank.scale)

    def _mixture(self) -> tuple[Tensor, Tensor]:
        """(lambda s, (1 - lambda) (R - I) as blocks [k, g, g])."""
        return self.mix * self.low_rank.scale, (1 - self.mix) * self.rotation.changes()

    def forward(self, x: Tensor, call: FrozenLinearCall) -> Tensor:  # [s, b, in] -> [s, b, out]
        """y = z + lambda s B (A x) + (1 - lambda) (R - I) z."""
        (A, B), dropout, held = self.low_rank.factors(), self.low_rank.input_dropout(call), self.held
        scale, D = self._mixture() if held is None else (held.scale, held.D)
        assert scale is not None
        return frozen_linear_mixed(x, A, B, D, scale, call, dropout, held)


build = Hybrid


# The layer as autograd functions, with m a mask of dropout and D and s those of the mixture, (1 - lambda)(R - I) and
# lambda s: y = z + D z + s B (A (m x)).
#
#     forward      u = s A (m x)       y = z + D z + B u
#     backward     du = s g B          dz = (I + D)^T g     dx = dz W + m (du A)                       with g = dy
#                  dA = du^T (m x)     dB = g^T u           dD = g^T z
#
# Where ranks sum the output, D acts on the whole z, so that the r-wide A x is summed apart from it, and z is kept in
# the place of y.


def frozen_linear_mixed(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    D: Tensor,
    scale: Tensor,
    call: FrozenLinearCall,
    dropout: Dropout | None = None,
    held: HeldBlocks | None = None,
) -> Tensor:
    """y = z + diag(D) z + scale B (A (m x)), z = W x, reduced where the layer sums its output.

    `scale` is a constant, a float32 scalar tensor; `held` of D, where it was built for the whole step.
    """
    producer = producer_of(x) if call.output_sum != "none" else None
    if call.needs_no_sum:
        return run_function(_MixedLinear, x, A, B, D, scale, call, dropout, producer, held)
    z = call.reduce(frozen_linear(x, call))
    u = call.reduce(run_function(_NarrowProduct, x, A, dropout, producer))
    return run_function(_MixReduced, z, u, B, D, scale, call.own_tokens(z.shape[0] * z.shape[1]), held)


class _MixedLinear(Function):
    @staticmethod
    @full_precision
    def forward(ctx, x, A, B, D, scale, call, dropout, producer, held):  # type: ignore[override]
        wait_u = start_narrow(masked(x, dropout and dropout.draw(x)), A, scale, call)
        whole_x = whole_sequence(x, call)
        u = wait_u()
        weight = call.weight
        ctx.changes_weight = dropout is None and rotates_weight(whole_x, weight, D)
        if ctx.changes_weight:
            y = linear(whole_x, changed_weight(weight, A, B, D, scale, held))
        else:
            y = add_blocks(linear(whole_x, weight), D, held and held.multiplier)
            flat(y).addmm_(flat(u), B.t())
        ctx.save_for_backward(x if producer is None else None, u, A, B, D, y)
        ctx.scale, ctx.call, ctx.dropout, ctx.producer, ctx.held = scale, call, dropout, producer, held
        ctx.trained = trained_factor(A), trained_factor(B)
        return y if call.bias is None else y + call.bias

    @staticmethod
    @full_precision
    def backward(ctx, grad):  # type: ignore[override]
        x, u, A, B, D, y = ctx.saved_tensors
        call, wait_dx = ctx.call, None
        du, wait_du = start_narrow_gradient(grad, B, ctx.scale, call)
        mask = ctx.dropout and ctx.dropout.draw_again()
        needs_x, needs_A, needs_B, *_ = ctx.needs_input_grad
        if needs_x and ctx.changes_weight:  # the low rank is in the weight
            changed = changed_weight(call.weight, A, B, D, ctx.scale, ctx.held)
            wait_whole_dx = start_input_gradient(linear(grad, changed.t()), call)
            wait_dx = lambda own_du: wait_whole_dx()  # noqa: E731
        elif needs_x:
            wait_dx = start_summed_gradient(unrotated(grad, D, ctx.held), call, du, A, mask)
        trained_A, trained_B = ctx.trained
        dB = outer_sum(u, grad, gradient_dtype(trained_B)).t() if needs_B else None
        own_du = wait_du()
        if ctx.producer is not None:
            x = recompute(ctx.producer)
        dA = outer_sum(own_du, masked(x, mask), gradient_dtype(trained_A)) if needs_A else None
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
    """u = A (m x). SwiGLU's output is recomputed from what it saved: a layer's widest input takes no memory twice."""

    @staticmethod
    @full_precision
    def forward(ctx, x, A, dropout, producer):  # type: ignore[override]
        ctx.save_for_backward(x if producer is None else None, A)
        ctx.dropout, ctx.producer, ctx.trained = dropout, producer, trained_factor(A)
        return linear(masked(x, dropout and dropout.draw(x)), A)

    @staticmethod
    @full_precision
    def backward(ctx, grad):  # type: ignore[override]
        x, A = ctx.saved_tensors
        x = recompute(ctx.producer) if x is None else x
        mask = ctx.dropout and ctx.dropout.draw_again()
        dA = outer_sum(grad, masked(x, mask), gradient_dtype(ctx.trained))
        return masked(linear(grad, A.t()), mask), delivered(ctx.trained, dA), None, None


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


# Of a stored adapter.


def merge(weight: Tensor, tensors: Mapping[str, Tensor], peft: PeftConfig) -> Tensor:  # [out, in] -> [out, in]
    """W + lambda s B A + (1 - lambda) (R - I) W; W has what --hybrid-merge-interval has merged into it."""
    weight = tensors["folded_weight"].to(weight.dtype) if "folded_weight" in tensors else weight
    mix = float(tensors["mix"])
    _, rotation = ROTATIONS[peft.hybrid_rotation]
    rotated = rotate_weight(weight, rotation(_part_of(tensors, "rotation."), peft), "output")
    return add_low_rank(weight.lerp(rotated, 1 - mix), _part_of(tensors, "low_rank."), mix * peft.lora_scale)


def _part_of(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensors[name] for name in tensors if name.startswith(prefix)}


def change(tensors: StoredTensors, peft: PeftConfig) -> MixedChange:
    """lambda s B A + (1 - lambda) (R - I) W."""
    _, rotation = ROTATIONS[peft.hybrid_rotation]
    return MixedChange(
        float(tensors["mix"]),
        scaled_product(_part_of(tensors, "low_rank."), peft.lora_scale),
        RotationChange(rotation(_part_of(tensors, "rotation."), peft), "output"),
        (lambda rows: tensors.rows("folded_weight", rows)) if "folded_weight" in tensors else None,
    )


# lambda of the Hybrid from the gradients of its two parts (Algorithm 2, lines 16-19).
#
#     lambda = g_low / (g_low + g_rot)
#
# g_low and g_rot measure the gradients before mixing: those that backward leaves carry the factors lambda and 1 -
# lambda, so they are divided by these. Undivided (`raw`, the paper's formula read literally) the recursion multiplies
# its own odds each step and runs into 0 or 1. Rules:
#
#     gradient    the norm
#     rms         the norm over the root of the number of parameters: the parts differ in size
#     descent     the learning rate times the sum of absolute values: what a step of Adam, which moves every number by
#                 about its rate, is about to gain by each part
#     raw         the norm as backward leaves it
#
# The value takes effect in the next forward, as a clamped moving average. Everything stays on the device: one
# [layers, 2] tensor, one all-reduce, no host-device sync.

OwnGradient = Callable[[nn.Parameter], Tensor]


@torch.no_grad()
def update_mixtures(
    adapters: Sequence[Hybrid],
    peft: PeftConfig,
    own_gradient: OwnGradient,
    group: dist.ProcessGroup,
    rotation_rate: float = 1.0,
) -> None:
    """Move every lambda towards what this step's gradients say.

    adapters: this rank's; all ranks of `group` hold parts of the same ones.
    peft: rule, moving average and limits.
    own_gradient: the part of a parameter's complete gradient that this rank counts, such that over `group` every
        number of the global gradient is counted once.
    group: the holders of parts: tensor-parallel ranks and, with a distributed optimizer, data-parallel shards.
    rotation_rate: learning rate of rotations over that of the low rank.
    """
    if not adapters or peft.fixed_mix is not None:
        return
    magnitude = torch.abs if peft.hybrid_lambda == "descent" else torch.square
    parts = [(adapter.low_rank, adapter.rotation) for adapter in adapters]
    sums = torch.stack([torch.stack([_sum(part, own_gradient, magnitude) for part in pair]) for pair in parts])
    sum_coalesced([sums], group)
    mix = torch.stack([adapter.mix for adapter in adapters])
    measures = sums if peft.hybrid_lambda == "descent" else sums.sqrt()
    if peft.hybrid_lambda == "rms":
        pairs = zip(adapters, parts, strict=True)
        counts = tuple(tuple(adapter.layout.num_global(part) for part in pair) for adapter, pair in pairs)
        measures = measures / _on_device(counts, sums.device).sqrt()
    if peft.hybrid_lambda == "descent":
        measures = measures * _on_device((1.0, rotation_rate), sums.device)
    if peft.hybrid_lambda != "raw":
        measures = measures / torch.stack([mix, 1 - mix], 1)
    # NaN where there is no gradient, or one of the two is infinite: the other's share would be 0.
    wanted = measures[:, 0] / measures.sum(1).where(measures.isfinite().all(1), torch.nan)
    for adapter, value, known in zip(adapters, *_averaged(mix, wanted, peft), strict=True):
        adapter.mix.copy_(value)
        adapter.num_kept += ~known


@cache
def _on_device(numbers: tuple[Any, ...], device: torch.device) -> Tensor:
    """Made once, since a copy from the host would wait for the device at every step."""
    return torch.tensor(numbers, device=device)


def _averaged(mix: Tensor, wanted: Tensor, peft: PeftConfig) -> tuple[Tensor, Tensor]:
    """(clamped moving average, mask of updated entries); NaN leaves lambda as it is."""
    average = peft.hybrid_lambda_ema
    moved = (average * mix + (1 - average) * wanted).clamp(peft.hybrid_lambda_min, peft.hybrid_lambda_max)
    known = torch.isfinite(wanted)
    return torch.where(known, moved, mix), known


def _sum(part: nn.Module, own_gradient: OwnGradient, magnitude: Callable[[Tensor], Tensor]) -> Tensor:
    return torch.stack([magnitude(own_gradient(parameter).float()).sum() for parameter in part.parameters()]).sum()
