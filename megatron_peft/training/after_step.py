"""--lora-max-norm-ratio, eq. (2), after each step: which tensors are scaled, and what the limits are.

The norms are those of the model's own parameters, whole on this rank's side of the split: a distributed optimizer has
gathered them by then. In float32 they are what the optimizer updates, or its stretches are views of them. Under --bf16
it updates a float32 copy, or a stretch of one, which is scaled by the same number.

One all-reduce of [layers, w, w] numbers over the tensor-parallel ranks a step, nothing where there are none.
"""

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor, nn

from megatron_peft.adapters.attach import linear_layers
from megatron_peft.adapters.linear import AdaptedLinear
from megatron_peft.adapters.low_rank import LowRank, gram_matrices, low_rank_part, shrink, shrinkage
from megatron_peft.parallel.collectives import sum_coalesced
from megatron_peft.training.shards import GradientShards
from megatron_peft.training.state import TrainingState


@torch.no_grad()
def bound_low_rank_norms(state: TrainingState) -> None:
    """Scale every low-rank change whose norm is above --lora-max-norm-ratio of its weight's. No look by the host."""
    peft = state.config.peft
    if peft.lora_max_norm_ratio is None:
        return
    layers = [target.module for chunk in state.model_chunks for target in linear_layers(chunk)]
    parts = [(layer, part) for layer in layers if (part := low_rank_part(layer.adapter)) is not None]
    if not parts:
        return
    low_ranks = [part for _, part in parts]
    limits = peft.lora_max_norm_ratio / peft.lora_scale * _base_norms(parts)
    factors = shrinkage(*_whole_gram_matrices(low_ranks), limits, peft.subtracts_start)
    shards = GradientShards(state.optimizer)
    for low_rank, t in zip(low_ranks, factors, strict=True):
        for parameter, start in _scaled(low_rank):
            _shrink_with_master(parameter, start, t, shards)


def _scaled(low_rank: LowRank) -> list[tuple[nn.Parameter, Tensor | None]]:
    if low_rank.A0 is None:
        return [(low_rank.B, None)]
    return [(low_rank.A, low_rank.A0), (low_rank.B, low_rank.B0)]


def _whole_gram_matrices(low_ranks: Sequence[LowRank]) -> tuple[Tensor, Tensor]:
    """Both of each layer, [layers, w, w]; the one over the split side summed over the ranks."""
    left, right = (torch.stack(sides) for sides in zip(*map(gram_matrices, low_ranks), strict=True))
    partial = [(left if low_rank.layout.split == "column" else right)[i] for i, low_rank in enumerate(low_ranks)]
    sum_coalesced(partial, low_ranks[0].layout.group)  # in place: these are views
    return left, right


def _base_norms(parts: Sequence[tuple[AdaptedLinear, LowRank]]) -> Tensor:
    """||W0||_F of the whole weights, [layers]; found at the first step of a process and kept."""
    if parts[0][1].base_norm is None:
        norms = [torch.linalg.vector_norm(layer.weight, dtype=torch.float64) for layer, _ in parts]
        squares = torch.stack(norms).square()
        group: Any = parallel_state.get_tensor_model_parallel_group()
        sum_coalesced([squares], group)
        for (_, low_rank), square in zip(parts, squares, strict=True):
            low_rank.base_norm = square.sqrt()
    return torch.stack([low_rank.base_norm for _, low_rank in parts if low_rank.base_norm is not None])


def _shrink_with_master(parameter: nn.Parameter, start: Tensor | None, t: Tensor, shards: GradientShards) -> None:
    """The parameter and its float32 copy, which is then rounded into it as the optimizer does.

    Not where it is a stretch: the parameter must stay the same on all data-parallel ranks, until the next gather.
    """
    shrink(parameter, start, t)
    master = getattr(parameter, "main_param", None)
    if master is None:
        return
    stretch = shards.stretch(parameter)
    shrink(master.view(-1), None if start is None else start.view(-1)[stretch], t)
    if not shards.is_sharded:
        parameter.copy_(master.view_as(parameter))
