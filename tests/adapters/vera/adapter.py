"""VeRA: y = W x + b * (B (d * (A x))), A [r, in] and B [out, r] random and shared, d [r] and b [out] trained."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megatron_peft.adapters.frozen_linear import FrozenLinearCall
from megatron_peft.adapters.low_rank_linear import frozen_linear_plus_low_rank
from megatron_peft.config import ConfigurationError, PeftConfig, PeftFormat
from megatron_peft.parallel.layout import LinearLayout, generator_for

START_OF_D = 0.1
BOUND = 0.4  # of the random numbers
FUSED = ("linear_qkv", "linear_fc1")

Pair = tuple[Tensor, Tensor]


class VeraAdapter(nn.Module):
    """The vectors of one adapted linear layer, and the rank's own slices of the pair."""

    A: Tensor
    B: Tensor

    def __init__(self, layout: LinearLayout, peft: PeftConfig, name: str, seed: int, dtype: torch.dtype) -> None:
        super().__init__()
        device = torch.cuda.current_device()
        self.layout = layout
        self.d = nn.Parameter(torch.full((peft.vera_rank,), START_OF_D, dtype=dtype, device=device))
        self.b = nn.Parameter(torch.zeros(layout.local_out_features, dtype=dtype, device=device))
        layout.mark_whole(self.d)
        layout.mark_output(self.b)

    def bind_shared(self, pairs: Mapping[LinearLayout, Pair]) -> None:
        """The slices of all layers of this layout; no checkpoint has them."""
        for name, tensor in zip("AB", pairs[self.layout], strict=True):
            self.register_buffer(name, tensor, persistent=False)

    def forward(self, x: Tensor, call: FrozenLinearCall) -> Tensor:  # [s, b, in] -> [s, b, out]
        """y = W x + (diag(b) B) (diag(d) A) x."""
        A, B = self.d[:, None] * self.A, self.b[:, None] * self.B
        return call.reduce(frozen_linear_plus_low_rank(x, A, B, 1.0, call))


build = VeraAdapter


def pair(out_features: int, in_features: int, peft: PeftConfig) -> Pair:
    """A [r, in] and B [out, r]: the first columns and rows of those of a larger layer."""

    def drawn(rows: int, name: str) -> Tensor:
        generator = generator_for(peft.vera_seed, f"vera.{name}")
        return torch.empty(rows, peft.vera_rank).uniform_(-BOUND, BOUND, generator=generator)

    return drawn(in_features, "A").t().contiguous(), drawn(out_features, "B")


def share(layouts: Sequence[LinearLayout], peft: PeftConfig, seed: int, dtype: torch.dtype) -> dict[LinearLayout, Pair]:
    """One copy for all layers of a layout."""
    device, found = torch.cuda.current_device(), {}
    for layout in layouts:
        A, B = pair(layout.out_features, layout.in_features, peft)
        found[layout] = layout.slice_input(A).to(device, dtype), layout.slice_output(B).to(device, dtype)
    return found


def merge(weight: Tensor, tensors: Mapping[str, Tensor], peft: PeftConfig) -> Tensor:  # [out, in] -> [out, in]
    """W + diag(b) B diag(d) A."""
    A, B = (one.to(weight.dtype) for one in pair(weight.shape[0], weight.shape[1], peft))
    d, b = (tensors[name].to(weight.dtype) for name in ("d", "b"))
    return weight.addmm_(b[:, None] * B, d[:, None] * A)


class VeraFormat(PeftFormat):
    """VeRA as Hugging Face PEFT has it, whose modules take the first rows and columns of one pair.

    Of a fused layer ours takes other rows of B than the modules would: refused.
    """

    rows = ("vera_lambda_b",)

    def config(self, peft: PeftConfig, target_modules: list[str]) -> dict[str, Any]:
        return {"peft_type": "VERA", "r": peft.vera_rank, "save_projection": True, "projection_prng_key": 0}

    def shapes(self, config: Mapping[str, Any], out_features: int, in_features: int) -> dict[str, tuple[int, ...]]:
        return {"vera_lambda_d": (config["r"],), "vera_lambda_b": (out_features,)}

    def shared(self, peft: PeftConfig, sizes: Mapping[str, tuple[int, int]]) -> dict[str, Tensor]:
        A, B = pair(max(size[0] for size in sizes.values()), max(size[1] for size in sizes.values()), peft)
        return {"base_model.vera_A": A, "base_model.vera_B": B}

    def tensors(
        self, tensors: Mapping[str, Tensor], peft: PeftConfig, layer: str, out_features: int
    ) -> dict[str, Tensor]:
        if layer.endswith(FUSED):
            raise ConfigurationError(f"HF PEFT's VeRA has no fused layers, as {layer} is: use --as-lora.")
        return {"vera_lambda_d": tensors["d"].float(), "vera_lambda_b": tensors["b"].float()}


EXPORT = VeraFormat()
