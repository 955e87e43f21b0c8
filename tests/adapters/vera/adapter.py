"""VeRA: y = W x + b * (B (d * (A x))), A [r, in] and B [out, r] random and shared, d [r] and b [out] trained."""

from collections.abc import Mapping
from functools import cache

import torch
from torch import Tensor, nn

from megatron_peft.adapters.frozen_linear import FrozenLinearCall
from megatron_peft.adapters.low_rank_linear import frozen_linear_plus_low_rank
from megatron_peft.config import PeftConfig
from megatron_peft.parallel.layout import LinearLayout, generator_for

START_OF_D = 0.1


class VeraAdapter(nn.Module):
    """The vectors of one adapted linear layer, and the rank's own slices of the pair."""

    def __init__(self, layout: LinearLayout, peft: PeftConfig, name: str, seed: int, dtype: torch.dtype) -> None:
        super().__init__()
        device = torch.cuda.current_device()
        self.A, self.B = slices_of_pair(layout, layout.group.rank(), peft.vera_rank, peft.vera_seed, dtype)
        self.d = nn.Parameter(torch.full((peft.vera_rank,), START_OF_D, dtype=dtype, device=device))
        self.b = nn.Parameter(torch.zeros(layout.local_out_features, dtype=dtype, device=device))
        layout.mark_whole(self.d)
        layout.mark_output(self.b)

    def forward(self, x: Tensor, call: FrozenLinearCall) -> Tensor:  # [s, b, in] -> [s, b, out]
        """y = W x + (diag(b) B) (diag(d) A) x."""
        A, B = self.d[:, None] * self.A, self.b[:, None] * self.B
        return call.reduce(frozen_linear_plus_low_rank(x, A, B, 1.0, call))


build = VeraAdapter


def pair(out_features: int, in_features: int, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """A [r, in] and B [out, r] of all layers of a size."""
    A = torch.empty(rank, in_features).uniform_(-1, 1, generator=generator_for(seed, f"vera.A {in_features}"))
    B = torch.empty(out_features, rank).uniform_(-1, 1, generator=generator_for(seed, f"vera.B {out_features}"))
    return A * (3 / in_features) ** 0.5, B * (3 / rank) ** 0.5


@cache
def slices_of_pair(
    layout: LinearLayout, group_rank: int, rank: int, seed: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """One copy for all layers of a size. `group_rank`: of `layout.group`, for the cache."""
    A, B = pair(layout.out_features, layout.in_features, rank, seed)
    device = torch.cuda.current_device()
    return layout.slice_input(A).to(device, dtype), layout.slice_output(B).to(device, dtype)


def merge(weight: Tensor, tensors: Mapping[str, Tensor], peft: PeftConfig) -> Tensor:  # [out, in] -> [out, in]
    """W + diag(b) B diag(d) A."""
    A, B = (one.to(weight.dtype) for one in pair(*weight.shape, peft.vera_rank, peft.vera_seed))
    d, b = (tensors[name].to(weight.dtype) for name in ("d", "b"))
    return weight.addmm_(b[:, None] * B, d[:, None] * A)
