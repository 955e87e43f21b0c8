"""Like DoRA: y = diag((1 + m) |W| / |W + s B A|) (W + s B A) x, |.| of each row, a constant in backward.

A [r, in] and B [out, r] as in LoRA, m [out] zero at the start: the length of a row, relative to its own in the base.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from megatron_peft.adapters.frozen_linear import FrozenLinearCall
from megatron_peft.adapters.low_rank_linear import frozen_linear_plus_low_rank
from megatron_peft.adapters.quantized_weight import dense
from megatron_peft.config import PeftConfig
from megatron_peft.parallel.collectives import sum_coalesced
from megatron_peft.parallel.layout import LinearLayout, generator_for


class DoraAdapter(nn.Module):
    """The factors and relative lengths of one adapted linear layer."""

    held: Tensor | None = None

    def __init__(self, layout: LinearLayout, peft: PeftConfig, name: str, seed: int, dtype: torch.dtype) -> None:
        super().__init__()
        device, rank = torch.cuda.current_device(), peft.dora_rank
        A = torch.empty(rank, layout.in_features).uniform_(-1, 1, generator=generator_for(seed, f"{name}.A"))
        self.layout, self.scale = layout, peft.dora_scale
        self.A = nn.Parameter(layout.slice_input(A / layout.in_features**0.5).to(device, dtype))
        self.B = nn.Parameter(torch.zeros(layout.local_out_features, rank, dtype=dtype, device=device))
        self.m = nn.Parameter(torch.zeros(layout.local_out_features, dtype=dtype, device=device))
        layout.mark_input(self.A)
        layout.mark_output(self.B)
        layout.mark_output(self.m)

    @staticmethod
    def begin_step(layers: Sequence[Any], is_training: bool) -> list[Tensor]:
        """`shrinking` of each layer, which stays as it is for a step; one sum over the ranks for all of them."""
        squares = [layer.adapter.squared_lengths(layer.weight) for layer in layers]
        rows = [one for one, layer in zip(squares, layers, strict=True) if layer.layout.split == "row"]
        sum_coalesced(rows, layers[0].layout.group)
        return [shrinking(one) for one in squares]

    def forward(self, x: Tensor, call: FrozenLinearCall) -> Tensor:  # [s, b, in] -> [s, b, out]
        """g (W + s B A) x, g = (1 + m) |W| / |W + s B A|, before the ranks are summed: then its gradient is partial."""
        g = ((1 + self.m) * (self.shrinking(call.weight) if self.held is None else self.held)).to(x.dtype)
        y = call.reduce(g * frozen_linear_plus_low_rank(x, self.A, self.B, self.scale, replace(call, bias=None)))
        return y if call.bias is None else y + call.bias

    def shrinking(self, weight: Tensor) -> Tensor:  # -> [out]
        """|W| / |W + s B A|."""
        squares = self.squared_lengths(weight)
        if self.layout.split == "row":
            sum_coalesced([squares], self.layout.group)
        return shrinking(squares)

    @torch.no_grad()
    def squared_lengths(self, weight: Tensor) -> Tensor:  # -> [2, out]
        """Of the rows of W and of W + s B A, over the rank's own columns."""
        W = dense(weight)  # with --base-precision a weight has no memory of its own
        changed = torch.addmm(W, self.B, self.A, alpha=self.scale)
        return torch.stack([one.square().sum(1) for one in (W, changed)])


def shrinking(squares: Tensor) -> Tensor:  # [2, out] -> [out]
    """|W| / |W + s B A| out of their squares."""
    return (squares[0] / squares[1]).sqrt()


build = DoraAdapter


def merge(weight: Tensor, tensors: Mapping[str, Tensor], peft: PeftConfig) -> Tensor:  # [out, in] -> [out, in]
    """diag((1 + m) |W| / |W + s B A|) (W + s B A)."""
    A, B, m = (tensors[name].to(weight.dtype) for name in ("A", "B", "m"))
    changed = torch.addmm(weight, B, A, alpha=peft.dora_scale)
    return ((1 + m) * weight.norm(dim=1) / changed.norm(dim=1))[:, None] * changed
