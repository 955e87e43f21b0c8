"""lambda of the Hybrid from the norms of the gradients of its two parts (Algorithm 2, lines 16-19).

    lambda = g_low / (g_low + g_rot)

g_low and g_rot are norms before mixing: the gradients that backward leaves carry the factors lambda and 1 - lambda,
so their norms are divided by these. Undivided (`raw`, the paper's formula read literally) the recursion multiplies its
own odds each step and runs into 0 or 1. The value acts from the next forward on, as a moving average, clamped.

Everything stays on the device: one [layers, 2] tensor of squares, one all-reduce, no look by the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_peft.adapters.hybrid import Hybrid
from megatron_peft.config import PeftConfig
from megatron_peft.parallel.collectives import sum_coalesced

LOWEST, HIGHEST = 0.02, 0.98

OwnGradient = Callable[[nn.Parameter], Tensor]


def hybrid_adapters(model_chunks: Iterable[nn.Module]) -> list[Hybrid]:
    """This rank's, in the order of the layers."""
    return [module for chunk in model_chunks for module in chunk.modules() if isinstance(module, Hybrid)]


@torch.no_grad()
def update_mixtures(
    adapters: Sequence[Hybrid], peft: PeftConfig, own_gradient: OwnGradient, group: dist.ProcessGroup
) -> None:
    """Move every lambda towards what this step's gradients say.

    Args:
        adapters: this rank's; all ranks of `group` hold parts of the same ones.
        peft: rule and moving average.
        own_gradient: the part of a parameter's complete gradient that this rank counts, such that over `group` every
            number of the global gradient is counted once.
        group: the holders of parts: tensor-parallel ranks and, with a distributed optimizer, data-parallel shards.
    """
    if not adapters or not peft.adapts_mix:
        return
    parts = [(adapter.low_rank.parameters(), adapter.rotation.parameters()) for adapter in adapters]
    squares = torch.stack([torch.stack([_squared_norm(p, own_gradient) for p in pair]) for pair in parts])
    sum_coalesced([squares], group)
    mix = torch.stack([adapter.mix for adapter in adapters])
    low, rotation = squares.sqrt().unbind(1)
    if peft.hybrid_lambda == "gradient":
        low, rotation = low / mix, rotation / (1 - mix)
    for adapter, value in zip(adapters, _averaged(mix, low / (low + rotation), peft.hybrid_lambda_ema), strict=True):
        adapter.mix.copy_(value)


def _averaged(mix: Tensor, wanted: Tensor, average: float) -> Tensor:
    """The moving average, clamped; a NaN (no gradient, or an infinite one) leaves the last value."""
    moved = (average * mix + (1 - average) * wanted).clamp(LOWEST, HIGHEST)
    return torch.where(torch.isfinite(moved), moved, mix)


def _squared_norm(parameters: Iterable[nn.Parameter], own_gradient: OwnGradient) -> Tensor:
    return torch.stack([own_gradient(parameter).float().square().sum() for parameter in parameters]).sum()
