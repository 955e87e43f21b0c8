"""lambda of the Hybrid from the gradients of its two parts (Algorithm 2, lines 16-19).

    lambda = g_low / (g_low + g_rot)

g_low and g_rot measure the gradients before mixing: those that backward leaves carry the factors lambda and
1 - lambda, so they are divided by these. Undivided (`raw`, the paper's formula read literally) the recursion multiplies
its own odds each step and runs into 0 or 1. Rules:

    gradient    the norm
    rms         the norm over the root of the number of parameters: the parts differ in size
    descent     the learning rate times the sum of absolute values: what a step of Adam, which moves every number by
                about its rate, is about to gain by each part
    raw         the norm as backward leaves it

The value acts from the next forward on, as a moving average, clamped. Everything stays on the device: one [layers, 2]
tensor, one all-reduce, no look by the host.
"""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_peft.adapters.hybrid import Hybrid
from megatron_peft.config import PeftConfig
from megatron_peft.parallel.collectives import sum_coalesced

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

    Args:
        adapters: this rank's; all ranks of `group` hold parts of the same ones.
        peft: rule, moving average and limits.
        own_gradient: the part of a parameter's complete gradient that this rank counts, such that over `group` every
            number of the global gradient is counted once.
        group: the holders of parts: tensor-parallel ranks and, with a distributed optimizer, data-parallel shards.
        rotation_rate: learning rate of rotations over that of the low rank.
    """
    if not adapters or not peft.adapts_mix:
        return
    magnitude = torch.abs if peft.hybrid_lambda == "descent" else torch.square
    parts = [(adapter.low_rank, adapter.rotation) for adapter in adapters]
    sums = torch.stack([torch.stack([_sum(part, own_gradient, magnitude) for part in pair]) for pair in parts])
    sum_coalesced([sums], group)
    mix = torch.stack([adapter.mix for adapter in adapters])
    measures = sums if peft.hybrid_lambda == "descent" else sums.sqrt()
    if peft.hybrid_lambda == "rms":
        counts = [[adapter.layout.num_global(p) for p in pair] for adapter, pair in zip(adapters, parts, strict=True)]
        measures = measures / torch.tensor(counts, device=sums.device).sqrt()
    if peft.hybrid_lambda == "descent":
        measures = measures * torch.tensor([1.0, rotation_rate], device=sums.device)
    if peft.hybrid_lambda != "raw":
        measures = measures / torch.stack([mix, 1 - mix], 1)
    wanted = measures[:, 0] / measures.sum(1)
    for adapter, value, known in zip(adapters, *_averaged(mix, wanted, peft), strict=True):
        adapter.mix.copy_(value)
        adapter.num_kept += ~known


def _averaged(mix: Tensor, wanted: Tensor, peft: PeftConfig) -> tuple[Tensor, Tensor]:
    """(the moving average, clamped; where it could move): a NaN (no gradient, or an infinite one) moves nothing."""
    average = peft.hybrid_lambda_ema
    moved = (average * mix + (1 - average) * wanted).clamp(peft.hybrid_lambda_min, peft.hybrid_lambda_max)
    known = torch.isfinite(wanted)
    return torch.where(known, moved, mix), known


def _sum(part: nn.Module, own_gradient: OwnGradient, magnitude: Callable[[Tensor], Tensor]) -> Tensor:
    return torch.stack([magnitude(own_gradient(parameter).float()).sum() for parameter in part.parameters()]).sum()
