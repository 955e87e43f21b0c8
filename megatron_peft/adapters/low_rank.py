"""LoRA: a frozen linear layer plus a low-rank change of its weight (the paper's eq. (1)).

    y = W x + s B (A x)        A [r, in], B [out, r], s = alpha / r (rank-stabilised: alpha / sqrt(r))

The paper calls our B its A in Algorithm 2, and our A its B. A starts Kaiming-uniform (a = sqrt 5, which is uniform in
+-1 / sqrt(in)), B at zero, so the change starts at zero.

Sharding follows the base's: what meets the split side of W is split with it, the other factor is whole on every rank
(`LinearLayout`). Letters: s sequence, b batch, r rank; in and out are a rank's own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from torch import Tensor, nn

from megatron_peft.adapters.frozen_linear import FrozenLinearCall, frozen_linear_plus_low_rank
from megatron_peft.config import PeftConfig, require
from megatron_peft.parallel.layout import LinearLayout
from megatron_peft.parallel.seeds import generator_for


class LowRank(nn.Module):
    """The factors A and B of one adapted linear layer, and the layer's forward with them.

    Args:
        layout: of the base weight; the factors' shapes and slices follow from it.
        peft: rank, alpha, dropout.
        name: global name of the adapter, `decoder.layers.N.….adapter`; with `seed` it fixes the initial values.
        seed: of the run.
        dtype: of the parameters.

    Raises:
        ConfigurationError: the rank is above the smaller side of W.
    """

    def __init__(self, layout: LinearLayout, peft: PeftConfig, name: str, seed: int, dtype: torch.dtype) -> None:
        super().__init__()
        rank, largest = peft.lora_rank, min(layout.out_features, layout.in_features)
        require(
            rank <= largest,
            f"--lora-rank {rank} is above {largest}, the smaller side of {name.removesuffix('.adapter')} "
            f"({layout.out_features} x {layout.in_features}): use at most {largest}.",
        )
        self.layout, self.scale, self.dropout = layout, peft.lora_scale, peft.lora_dropout
        device = torch.cuda.current_device()
        bound = layout.in_features**-0.5
        A = torch.empty(rank, layout.in_features).uniform_(-bound, bound, generator=generator_for(seed, f"{name}.A"))
        self.A = nn.Parameter(layout.slice_input(A).to(device, dtype, copy=True).contiguous())
        self.B = nn.Parameter(torch.zeros(layout.local_out_features, rank, dtype=dtype, device=device))
        layout.mark_input(self.A)
        layout.mark_output(self.B)

    def forward(self, x: Tensor, call: FrozenLinearCall) -> Tensor:  # [s, b, in] -> [s, b, out]
        """y = W x + s B (A x), W frozen. Row-parallel: both terms are reduced in the base's own sum."""
        mask = self.dropout_mask(x, call)
        return call.reduce(frozen_linear_plus_low_rank(x, self.A, self.B, self.scale, call, mask))

    def delta_weight(self) -> Tensor:  # -> [out, in]
        """s B A, the rank's own slice of the change of W."""
        return self.scale * (self.B @ self.A)

    def dropout_mask(self, x: Tensor, call: FrozenLinearCall) -> Tensor | None:
        """Zeros and 1 / (1 - p), shaped like x; None without dropout.

        Where the ranks hold the same x they must drop the same of it: the default generator is common to the
        tensor-parallel ranks. Where x is split, by features or by tokens, each rank draws from its own.
        """
        if not (self.training and self.dropout):
            return None
        if self.layout.split == "column" and not call.splits_sequence:
            return F.dropout(torch.ones_like(x), self.dropout)
        with tensor_parallel.get_cuda_rng_tracker().fork():  # pyright: ignore[reportOptionalMemberAccess]
            return F.dropout(torch.ones_like(x), self.dropout)
