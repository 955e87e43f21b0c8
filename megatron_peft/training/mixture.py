"""The Hybrid's lambda within a step: which gradients a rank counts, and what a log line says."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor, nn

from megatron_peft.adapters.mixture import OwnGradient, hybrid_adapters, update_mixtures
from megatron_peft.training.state import TrainingState


def mix_from_gradients(state: TrainingState) -> None:
    """Update every lambda from this step's complete gradients, before they are clipped. One all-reduce."""
    adapters = hybrid_adapters(state.model_chunks)
    sharded = state.config.optimizer.use_distributed_optimizer
    group: Any = (
        parallel_state.get_tensor_and_data_parallel_group()
        if sharded
        else parallel_state.get_tensor_model_parallel_group()
    )
    update_mixtures(adapters, state.config.peft, _own_gradient(state.optimizer), group)


def mixture_summary(state: TrainingState) -> dict[str, float]:
    """mean, min and max of lambda over the layers of the whole model; empty without the Hybrid. A collective."""
    if state.config.peft.method != "hybrid":
        return {}
    values = torch.tensor([float(adapter.mix) for adapter in hybrid_adapters(state.model_chunks)])
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, values)
    every = torch.cat(gathered)
    return {"mean": float(every.mean()), "min": float(every.min()), "max": float(every.max())}


def _own_gradient(optimizer: Any) -> OwnGradient:
    """Replicated parameters count on the first tensor-parallel rank; a distributed optimizer's rank has its shard."""
    counts_replicated = parallel_state.get_tensor_model_parallel_rank() == 0
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    sharded = [part for part in parts if isinstance(part, DistributedOptimizer) and not part.is_stub_optimizer]
    held = {
        parameter: part._get_model_param_range_map(parameter)["param"]
        for part in sharded
        for parameter in part.model_param_group_index_map
    }
    is_sharded = any(isinstance(part, DistributedOptimizer) for part in parts)

    def own(parameter: nn.Parameter) -> Tensor:
        gradient = parameter.main_grad.flatten()  # pyright: ignore[reportAttributeAccessIssue]
        if not (parameter.tensor_model_parallel or counts_replicated):  # pyright: ignore[reportAttributeAccessIssue]
            return gradient[:0]
        if not is_sharded:
            return gradient
        stretch = held.get(parameter)
        return gradient[:0] if stretch is None else gradient[stretch.start : stretch.end]

    return own
