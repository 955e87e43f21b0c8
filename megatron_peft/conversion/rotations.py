"""The rotation of a trained adapter as dense blocks, whatever method and parametrization it was trained in.

Letters: k groups of g features, on the side that turns.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_peft.adapters.butterfly import cayley, compose, skew
from megatron_peft.adapters.unitary import as_real, change_from_start, structured
from megatron_peft.config import PeftConfig
from megatron_peft.conversion.trained_adapters import TrainedAdapters

Read = Callable[[str], Tensor]  # a tensor of the adapter by its name, in float64


def rotation_blocks(adapters: TrainedAdapters, layer: str, part: str = "") -> Tensor:  # -> [k, g, g]
    """R of a layer in float64.

    Args:
        part: what comes before the names, where an adapter has several parts: `rotation.`.
    """
    form = next(blocks for name, blocks in FORMS.items() if adapters.has(layer, f"{part}{name}"))
    return form(lambda name: adapters.tensor(layer, f"{part}{name}").double(), adapters.record.config.peft)


def cayley_blocks(read: Read, peft: PeftConfig) -> Tensor:
    """BOFT's, of numbers above the diagonals."""
    return compose(cayley(skew(read("Q"), peft.boft_block_size)))


def projected_blocks(read: Read, peft: PeftConfig) -> Tensor:
    """BOFT's, whose small blocks are kept as they are."""
    return compose(read("P"))


def structured_blocks(read: Read, peft: PeftConfig) -> Tensor:
    """uRNN's, of phases and reflections."""
    permutation = read("permutation").long()
    change = as_real(change_from_start(read("theta"), structured(read("start"), permutation), permutation))
    return change + torch.eye(change.shape[-1], dtype=change.dtype)


def unitary_blocks(read: Read, peft: PeftConfig) -> Tensor:
    """uRNN's, whose unitary blocks are kept as they are."""
    return as_real(torch.view_as_complex(read("U")))


# By the tensor that only this form has.
FORMS: dict[str, Callable[[Read, PeftConfig], Tensor]] = {
    "Q": cayley_blocks,
    "P": projected_blocks,
    "theta": structured_blocks,
    "U": unitary_blocks,
}
