"""Like DoRA: y = diag((1 + m) |W| / |W + s B A|) (W + s B A) x, |.| of each row, a constant in backward.

A [r, in] and B [out, r] as in LoRA, m [out] zero at the start: the length of a row, relative to its own in the base.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region
from torch import Tensor, nn

from megatron_peft.adapters.frozen_linear import FrozenLinearCall
from megatron_peft.adapters.low_rank_linear import frozen_linear_plus_low_rank
from megatron_peft.config import PeftConfig
from megatron_peft.parallel.layout import LinearLayout, generator_for


class DoraAdapter(nn.Module):
    """The factors and relative lengths of one adapted linear layer."""

    weight: Tensor

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

    def bind_weight(self, weight: nn.Parameter) -> None:
        """The base's, which is frozen."""
        self.weight = weight.detach()

    def forward(self, x: Tensor, call: FrozenLinearCall) -> Tensor:  # [s, b, in] -> [s, b, out]
        """g (W + s B A) x, g = (1 + m) |W| / |W + s B A|, before the ranks are summed: then its gradient is partial."""
        g = ((1 + self.m) * self.shrinking()).to(x.dtype)
        y = call.reduce(g * frozen_linear_plus_low_rank(x, self.A, self.B, self.scale, replace(call, bias=None)))
        return y if call.bias is None else y + call.bias

    @torch.no_grad()
    def shrinking(self) -> Tensor:  # -> [out]
        """|W| / |W + s B A|, which stays as it is for a step. One sum over the ranks of a row-parallel layer."""
        changed = torch.addmm(self.weight, self.B, self.A, alpha=self.scale)
        squares = torch.stack([one.square().sum(1) for one in (self.weight, changed)])
        if self.layout.split == "row":
            squares = reduce_from_tensor_model_parallel_region(squares, group=self.layout.group)
        return (squares[0] / squares[1]).sqrt()


build = DoraAdapter


def merge(weight: Tensor, tensors: Mapping[str, Tensor], peft: PeftConfig) -> Tensor:  # [out, in] -> [out, in]
    """diag((1 + m) |W| / |W + s B A|) (W + s B A)."""
    A, B, m = (tensors[name].to(weight.dtype) for name in ("A", "B", "m"))
    changed = torch.addmm(weight, B, A, alpha=peft.dora_scale)
    return ((1 + m) * weight.norm(dim=1) / changed.norm(dim=1))[:, None] * changed
