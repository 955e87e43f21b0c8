"""What the formats of Hugging Face PEFT have in common: names of tensors, and what an import gives."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_peft.config import PeftConfig
from megatron_peft.conversion.hf_files import Source

PREFIX = "base_model.model."
WAY_OUT = "Merge it with HF PEFT (`merge_and_unload`, then `save_pretrained`) and give the result as the base model."


@dataclass(frozen=True)
class Adopted:
    """Adapters as a run has them.

    Args:
        peft: the run's method and numbers.
        tensors: whole ones by key, `decoder.layers.3.mlp.linear_fc1.adapter.A`.
        flags: what a run is given to load them, without its target modules.
        told: lines about what is not as it was, each with its end.
    """

    peft: PeftConfig
    tensors: Mapping[str, Tensor]
    flags: str
    told: str = ""


def whole_tensor(source: Source, name: str) -> Tensor:
    """In float32, in memory of its own."""
    return source.slice(name, (slice(None),) * len(source.headers[name].shape)).to(torch.float32, copy=True)
