"""The Hybrid (Algorithm 2): LoRA-GA's low rank and BOFT's rotation in one layer, mixed by lambda.

    y = z + lambda s B (A x) + (1 - lambda) (R - I) z,   z = W x

lambda is a number a layer, from the norms of the gradients of the two parts (`adapters/mixture.py`). The paper adds
this change to W at every step, which would apply it again and again; W stays frozen here and the change is added once.
I + (1 - lambda)(R - I) is not orthogonal, but it has an inverse, so backward can keep y (`frozen_linear.py`).

Where the layer is row-parallel R acts on the reduced z, so the r-wide A x is reduced apart from it; what is kept is z,
in the place of y.

Letters: s sequence, b batch, r rank, k blocks of g features; in and out are a rank's own.
"""

import torch
from torch import Tensor, nn

from megatron_peft.adapters.blocks import add_blocks
from megatron_peft.adapters.boft import boft
from megatron_peft.adapters.frozen_linear import (
    FrozenLinearCall,
    changed_weight,
    frozen_linear,
    frozen_linear_mixed,
    rotation_gradients,
)
from megatron_peft.adapters.low_rank import LowRank
from megatron_peft.adapters.urnn import urnn_rotation
from megatron_peft.config import PeftConfig
from megatron_peft.parallel.layout import LinearLayout, mark_split
from megatron_peft.runtime.autograd import made_again, maker_of, run_function
from megatron_peft.runtime.cpu_kernels import flat, linear, outer_sum

ROTATIONS = {"boft": boft, "urnn": urnn_rotation}


class Hybrid(nn.Module):
    """The two parts of one adapted linear layer and their mixture.

    Args: as for `LowRank`, and BOFT's numbers in `peft`.

    Attributes:
        mix: lambda, a float32 scalar in the checkpoint.
        num_kept: steps in which a gradient's norm was not finite, so that lambda kept its value.
        folded_weight: the base's weight with changes folded in, or None (`--hybrid-merge-interval`).

    Raises:
        ConfigurationError: as `LowRank` and `Boft`.
    """

    mix: Tensor
    num_kept: Tensor
    folded_weight: Tensor | None

    def __init__(self, layout: LinearLayout, peft: PeftConfig, name: str, seed: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.layout = layout
        self.low_rank = LowRank(layout, peft, f"{name}.low_rank", seed, dtype)
        self.rotation = ROTATIONS[peft.hybrid_rotation](layout, peft, name, seed, dtype)
        device = torch.cuda.current_device()
        self.register_buffer("mix", torch.tensor(peft.initial_mix, device=device))
        self.register_buffer("num_kept", torch.tensor(0, device=device), persistent=False)
        self.register_buffer("folded_weight", None)

    def keep_folded(self, weight: Tensor) -> None:
        """Put the layer's weight into the checkpoint: from now on changes may be folded into it.

        Args:
            weight: [out, in], the base's own tensor; the buffer is a view of it, so a loaded checkpoint loads it.
        """
        self.folded_weight = weight.detach()
        mark_split(self.folded_weight, weight.partition_dim, weight.partition_stride)  # pyright: ignore[reportAttributeAccessIssue]

    @torch.no_grad()
    def fold(self) -> None:
        """W <- W + lambda s (B A) + (1 - lambda) (R - I) W, this rank's slice; the parts start again at no change."""
        assert self.folded_weight is not None
        scale, D = self._mixture()
        weight = self.folded_weight
        weight.copy_(changed_weight(weight, *self.low_rank.factors(), D, scale))
        self.low_rank.restart()
        self.rotation.restart()

    def _mixture(self) -> tuple[Tensor, Tensor]:
        """(lambda s, (1 - lambda) (R - I) as blocks [k, g, g])."""
        return self.mix * self.low_rank.scale, (1 - self.mix) * self.rotation.changes()

    def forward(self, x: Tensor, call: FrozenLinearCall) -> Tensor:  # [s, b, in] -> [s, b, out]
        """y = z + lambda s B (A x) + (1 - lambda) (R - I) z."""
        (A, B), mask = self.low_rank.factors(), self.low_rank.dropout_mask(x, call)
        scale, D = self._mixture()
        if call.needs_no_sum:
            maker = maker_of(x) if self.layout.split == "row" and mask is None else None
            return frozen_linear_mixed(x, A, B, D, scale, call, mask, maker)
        z = call.reduce(frozen_linear(x, call))
        x = x if mask is None else x * mask
        u = call.reduce(run_function(_NarrowProduct, x, A, maker_of(x)))
        return _MixReduced.apply(z, u, B, D, scale, call.own_tokens(z.shape[0] * z.shape[1]))


class _NarrowProduct(torch.autograd.Function):
    """u = A x. What SwiGLU gives is made again of what it keeps: the widest input of a layer takes no memory twice."""

    @staticmethod
    def forward(ctx, x, A, maker):  # type: ignore[override]
        ctx.save_for_backward(x if maker is None else None, A)
        ctx.maker = maker
        return linear(x, A)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        x, A = ctx.saved_tensors
        dA = outer_sum(grad, made_again(ctx.maker) if x is None else x)
        return linear(grad, A.t()), dA, None


class _MixReduced(torch.autograd.Function):
    """y = z + diag(D) z + scale B u for z and u that are whole; gradients of B and D over this rank's tokens."""

    @staticmethod
    def forward(ctx, z, u, B, D, scale, tokens):  # type: ignore[override]
        u = u * scale
        y = add_blocks(z, D)
        flat(y).addmm_(flat(u), B.t())
        ctx.save_for_backward(z, u, B, D)
        ctx.scale, ctx.tokens = scale, tokens
        return y

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        z, u, B, D = ctx.saved_tensors
        dz, dD = rotation_gradients(grad, D, z, kept_is_output=False, tokens=ctx.tokens)
        dB = outer_sum(flat(u)[ctx.tokens], flat(grad)[ctx.tokens]).t()
        return dz, linear(grad, B.t()).mul_(ctx.scale), dB, dD, None, None
