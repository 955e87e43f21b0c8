"""LoRA: a frozen linear layer plus a low-rank change of its weight (the paper's eq. (1)).

    y = W x + s B (A x)        A [r, in], B [out, r], s = alpha / r (rank-stabilised: alpha / sqrt(r))

The paper calls our B its A in Algorithm 2, and our A its B. A starts Kaiming-uniform (a = sqrt 5, which is uniform in
+-1 / sqrt(in)), B at zero, so the change starts at zero. Two starts of LoRA-GA begin with a product that is not zero
and subtract a frozen copy of it; both products are one of width 2r:

    y = W x + s (B A - B0 A0) x = W x + s [B, -B0] [A; A0] x

Sharding follows the base's: what meets the split side of W is split with it, the other factor is whole on every rank
(`LinearLayout`). Letters: s sequence, b batch, r rank; in and out are a rank's own.
"""

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from megatron.core import tensor_parallel
from torch import Tensor, nn

from megatron_peft.adapters.change import LowRankChange, StoredTensors
from megatron_peft.adapters.frozen_linear import FrozenLinearCall
from megatron_peft.adapters.low_rank_linear import Dropout, frozen_linear_plus_low_rank, join_start
from megatron_peft.config import PeftConfig, PeftFormat
from megatron_peft.config.methods.low_rank import IS_LORA_B, IS_NOT_DECAYED
from megatron_peft.parallel.layout import LinearLayout, generator_for


class LowRank(nn.Module):
    """The factors A and B of one adapted linear layer, and the layer's forward with them.

    Shapes and slices follow from the layout of the base weight, initial values from the adapter's global name,
    `decoder.layers.N.….adapter`, and the run's seed.
    """

    A0: Tensor | None  # the start that is subtracted, sharded like A and B: buffers in the checkpoint
    B0: Tensor | None
    base_norm: Tensor | None = None  # ||W||_F of the whole weight that the change is added to, set on first use

    def __init__(self, layout: LinearLayout, peft: PeftConfig, name: str, seed: int, dtype: torch.dtype) -> None:
        super().__init__()
        rank, subtracts_start = peft.lora_rank, peft.spec.subtracts_start(peft)
        self.layout, self.scale, self.dropout = layout, peft.lora_scale, peft.lora_dropout
        device = torch.cuda.current_device()
        bound = layout.in_features**-0.5
        A = torch.empty(rank, layout.in_features).uniform_(-bound, bound, generator=generator_for(seed, f"{name}.A"))
        self.A = nn.Parameter(layout.slice_input(A).to(device, dtype, copy=True).contiguous())
        self.B = nn.Parameter(torch.zeros(layout.local_out_features, rank, dtype=dtype, device=device))
        self.register_buffer("A0", torch.zeros_like(self.A.data) if subtracts_start else None)
        self.register_buffer("B0", torch.zeros_like(self.B.data) if subtracts_start else None)
        for A, B in self._pairs():
            layout.mark_input(A)
            layout.mark_output(B)
        setattr(self.B, IS_LORA_B, True)
        if subtracts_start:  # decay pulls B A to zero, which is not where the change is zero
            setattr(self.A, IS_NOT_DECAYED, True)
            setattr(self.B, IS_NOT_DECAYED, True)

    def _pairs(self) -> list[tuple[Tensor, Tensor]]:
        return [(self.A, self.B), *([(self.A0, self.B0)] if self.A0 is not None and self.B0 is not None else [])]

    @torch.no_grad()
    def start_at(self, A: Tensor, B: Tensor) -> None:
        """Begin with these factors, the rank's own slices. Where the start is subtracted it is what is subtracted."""
        for own_A, own_B in self._pairs():
            own_A.copy_(A)
            own_B.copy_(B)

    @torch.no_grad()
    def restart(self) -> None:
        """Back to no change: B at zero where no start is subtracted, else both factors at the start.

        The weight that changes are added to is another one from now on.
        """
        self.base_norm = None
        if self.A0 is None or self.B0 is None:
            self.B.zero_()
        else:
            self.A.copy_(self.A0)
            self.B.copy_(self.B0)

    def factors(self) -> tuple[Tensor, Tensor]:
        """(A, B) of the whole change: [A; A0] and [B, -B0] where a start is subtracted. [w, in], [out, w]."""
        if self.A0 is None or self.B0 is None:
            return self.A, self.B
        return join_start(self.A, self.A0, 0), join_start(self.B, -self.B0, 1)

    def forward(self, x: Tensor, call: FrozenLinearCall) -> Tensor:  # [s, b, in] -> [s, b, out]
        """y = W x + s B (A x), W frozen. Row-parallel: both terms are reduced in the base's own sum."""
        A, B = self.factors()
        return call.reduce(frozen_linear_plus_low_rank(x, A, B, self.scale, call, self.input_dropout(call)))

    def delta_weight(self) -> Tensor:  # -> [out, in]
        """s B A (less s B0 A0), the rank's own slice of the change of W."""
        A, B = self.factors()
        return self.scale * (B @ A)

    def input_dropout(self, call: FrozenLinearCall) -> Dropout | None:
        """What is drawn for this call; None without dropout.

        Ranks with the same x must use the same mask: the default generator is common to the
        tensor-parallel ranks. Where x is split, by features or by tokens, each rank draws from its own. With the
        sequence split that is the default one: megatron-core's block has taken it for all of its layers.
        """
        if not (self.training and self.dropout):
            return None
        if self.layout.split == "column" or call.output_sum == "own tokens":
            return Dropout(self.dropout, nullcontext)
        return Dropout(self.dropout, tensor_parallel.get_cuda_rng_tracker().fork)  # pyright: ignore[reportOptionalMemberAccess]


build = LowRank


def low_rank_part(adapter: nn.Module | None) -> LowRank | None:
    """An adapter itself, or the low-rank part of a Hybrid; None if there is none."""
    part = getattr(adapter, "low_rank", adapter)
    return part if isinstance(part, LowRank) else None


def merge(weight: Tensor, tensors: Mapping[str, Tensor], peft: PeftConfig) -> Tensor:  # [out, in] -> [out, in]
    """W + s B A, in place."""
    return add_low_rank(weight, tensors, peft.lora_scale)


def add_low_rank(weight: Tensor, tensors: Mapping[str, Tensor], scale: float) -> Tensor:  # [out, in] -> [out, in]
    """W + scale B A (less scale B0 A0), in place."""
    A, B = whole_factors(tensors)
    return weight.addmm_(B.to(weight.dtype), A.to(weight.dtype), alpha=scale)


def change(tensors: StoredTensors, peft: PeftConfig) -> LowRankChange:
    """s B A (less s B0 A0)."""
    return scaled_product(tensors, peft.lora_scale)


def scaled_product(tensors: Mapping[str, Tensor], scale: float) -> LowRankChange:
    """scale B A (less scale B0 A0), in float64."""
    A, B = whole_factors({name: tensor.double() for name, tensor in tensors.items()})
    return LowRankChange(A, scale * B)


def whole_factors(tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(A, B) of the whole change: [A; A0] and [B, -B0] if a start is subtracted. [w, in], [out, w]."""
    A, B = tensors["A"], tensors["B"]
    if "A0" not in tensors:
        return A, B
    return torch.cat([A, tensors["A0"].to(A.dtype)]), torch.cat([B, -tensors["B0"].to(B.dtype)], dim=1)


class LoraFormat(PeftFormat):
    """LoRA as Hugging Face PEFT has it. A start that is subtracted doubles the rank: [B, -B0] and [A; A0]."""

    rows = ("lora_B.weight",)

    def config(self, peft: PeftConfig, target_modules: list[str]) -> dict[str, Any]:
        growth = 2 if peft.spec.subtracts_start(peft) else 1
        return {
            "peft_type": "LORA",
            "r": growth * peft.lora_rank,
            "lora_alpha": whole_number(grown_alpha(peft.lora_alpha, growth, peft.lora_rs)),
            "use_rslora": peft.lora_rs,
            "lora_dropout": peft.lora_dropout,
            "bias": "none",
            "fan_in_fan_out": False,
            "init_lora_weights": True,
        }

    def shapes(self, config: Mapping[str, Any], out_features: int, in_features: int) -> dict[str, tuple[int, ...]]:
        return {"lora_A.weight": (config["r"], in_features), "lora_B.weight": (out_features, config["r"])}

    def tensors(
        self, tensors: Mapping[str, Tensor], peft: PeftConfig, layer: str, out_features: int
    ) -> dict[str, Tensor]:
        A, B = whole_factors(tensors)
        return {"lora_A.weight": A, "lora_B.weight": B}


EXPORT = LoraFormat()


def grown_alpha(alpha: float, growth: float, rank_stabilised: bool) -> float:
    """alpha of a rank `growth` times as high, for the same scale."""
    return alpha * (growth**0.5 if rank_stabilised else growth)


def whole_number(alpha: float) -> float:
    """6.0 as 6, as HF PEFT writes it."""
    return int(alpha) if alpha == int(alpha) else alpha


# Eq. (2): ||dW||_F <= X ||W0||_F for a low-rank change dW = s B A, kept by scaling its factors.
#
# dW is never formed. |B A|^2 is the sum of the products of the entries of two small Gram matrices, B^T B and A A^T, and
# a Gram matrix over a side that is split over ranks is the sum of theirs.
#
# Without a subtracted start B alone is scaled, by t = limit / |B A|. With one, dW / s = B A - B0 A0, and scaling A - A0
# and B - B0 by t gives t P + t^2 Q with
#
#     P = (B - B0) A0 + B0 (A - A0)        Q = (B - B0)(A - A0)
#
# whose norm is at most t |P| + t^2 |Q|, which is the limit at t = 2 limit / (|P| + sqrt(|P|^2 + 4 limit |Q|)). Both are
# one formula: without a start P = B A and Q = 0. Nothing is scaled where |P + Q| is within the limit. No
# host-device sync, no communication here.
#
# Letters: r rank, w = r, or 2r with a subtracted start.


def gram_matrices(low_rank: LowRank) -> tuple[Tensor, Tensor]:
    """(L^T L, R R^T), [w, w] in float64, of this rank's L = [B - B0, B0] and R = [A0; A - A0] with P = L R.

    Without a subtracted start L = B and R = A.
    """
    A, B = low_rank.A.detach().double(), low_rank.B.detach().double()
    if low_rank.A0 is not None and low_rank.B0 is not None:
        A = torch.cat([low_rank.A0.double(), A - low_rank.A0])
        B = torch.cat([B - low_rank.B0, low_rank.B0.double()], dim=1)
    return B.T @ B, A @ A.T


def shrinkage(left: Tensor, right: Tensor, limits: Tensor, subtracts_start: bool) -> Tensor:
    """t of each layer, 1 where |dW| / s is within its limit. limits: [layers]; left, right: complete Gram matrices
    [layers, w, w], where w is r, or 2r if the start is subtracted."""
    P = _norm(left, right)
    if not subtracts_start:
        return _within(P, limits, P, torch.zeros_like(P))
    r = left.shape[-1] // 2
    both = right.clone()  # of [A0 + (A - A0); A - A0], for P + Q = L times that
    both[:, :r] += right[:, r:]
    both[:, :, :r] += both[:, :, r:].clone()
    Q = _norm(left[:, :r, :r], right[:, r:, r:])
    return _within(_norm(left, both), limits, P, Q)


def _within(norm: Tensor, limits: Tensor, P: Tensor, Q: Tensor) -> Tensor:
    root = 2 * limits / (P + (P.square() + 4 * limits * Q).sqrt())
    return torch.where(norm > limits, root, 1.0)


def _norm(left: Tensor, right: Tensor) -> Tensor:
    """|L R|_F out of L^T L and R R^T, [layers]."""
    return (left * right).sum((-2, -1)).clamp_min(0).sqrt()


@torch.no_grad()
def shrink(factor: Tensor, start: Tensor | None, t: Tensor) -> None:
    """factor <- start + t (factor - start) in place; start None stands for zero. t is a scalar tensor."""
    if start is None:
        factor.mul_(t)
    else:
        factor.copy_(torch.lerp(start.to(factor), factor, t.to(factor)))  # exact at t = 1
