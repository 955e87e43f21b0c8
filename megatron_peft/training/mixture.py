"""The Hybrid's lambda within a step: which gradients a rank counts, and what a log line says."""

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn

from megatron_peft.adapters.attach import linear_layers
from megatron_peft.adapters.hybrid import Hybrid, OwnGradient, update_mixtures
from megatron_peft.training.shards import GradientShards
from megatron_peft.training.state import TrainingState


@dataclass(frozen=True)
class Mixtures:
    """lambda of every adapted layer of the whole model.

    Args:
        by_layer: lambda by the layer's global name.
        num_kept: how often, so far in this process, a lambda kept its value because a gradient's norm was not finite.
    """

    by_layer: dict[str, float]
    num_kept: int

    def summary(self) -> dict[str, float]:
        """mean, min and max over the layers."""
        values = list(self.by_layer.values())
        return {"mean": sum(values) / len(values), "min": min(values), "max": max(values)}


def hybrid_adapters(state: TrainingState) -> dict[str, Hybrid]:
    """This rank's, by the global name of their layer, in the order of the layers."""
    layers = [layer for chunk in state.model_chunks for layer in linear_layers(chunk)]
    return {layer.name: layer.module.adapter for layer in layers if isinstance(layer.module.adapter, Hybrid)}


def mix_from_gradients(state: TrainingState) -> None:
    """Update every lambda from this step's complete gradients, before they are clipped. One all-reduce."""
    peft, lr = state.config.peft, state.config.optimizer.lr
    if peft.method != "hybrid" or not peft.adapts_mix:
        return
    shards = GradientShards(state.optimizer)
    group: Any = (
        parallel_state.get_tensor_and_data_parallel_group()
        if shards.is_sharded
        else parallel_state.get_tensor_model_parallel_group()
    )
    adapters = list(hybrid_adapters(state).values())
    update_mixtures(adapters, peft, _counted(shards), group, peft.rotation_lr(lr) / lr)


def mixtures(state: TrainingState) -> Mixtures | None:
    """lambda now; None without the Hybrid. A collective."""
    if state.config.peft.method != "hybrid":
        return None
    own = {name: (float(adapter.mix), int(adapter.num_kept)) for name, adapter in hybrid_adapters(state).items()}
    gathered: list[dict[str, tuple[float, int]]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, own)
    every = {name: values for part in gathered for name, values in part.items()}
    ordered = sorted(every, key=lambda name: int(name.split(".")[2]))
    return Mixtures({name: every[name][0] for name in ordered}, sum(kept for _, kept in every.values()))


def _counted(shards: GradientShards) -> OwnGradient:
    """Replicated parameters count on the first tensor-parallel rank."""
    counts_replicated = parallel_state.get_tensor_model_parallel_rank() == 0

    def own(parameter: nn.Parameter) -> Tensor:
        gradient = shards.own(parameter)
        counts = counts_replicated or parameter.tensor_model_parallel  # pyright: ignore[reportAttributeAccessIssue]
        return gradient if counts else gradient[:0]

    return own
