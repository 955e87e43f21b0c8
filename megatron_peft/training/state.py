"""What a training run is made of, and how far it has come."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor, nn

from megatron_peft.config import RunConfig
from megatron_peft.models.shape import ModelShape
from megatron_peft.parallel.collectives import sum_coalesced


class GradientShards:
    """The stretches of the flattened gradients that are this rank's own.

    Without a distributed optimizer every data-parallel rank holds the whole; with one, gradients were scattered and a
    rank has a stretch of some parameters and nothing of the others.

    Args:
        optimizer: megatron-core's.
    """

    def __init__(self, optimizer: Any) -> None:
        parts = getattr(optimizer, "chained_optimizers", [optimizer])
        self.is_sharded = any(isinstance(part, DistributedOptimizer) for part in parts)
        self._held = {
            parameter: part._get_model_param_range_map(parameter)["param"]
            for part in parts
            if isinstance(part, DistributedOptimizer) and not part.is_stub_optimizer
            for parameter in part.model_param_group_index_map
        }

    def stretch(self, parameter: nn.Parameter) -> slice:
        """Of the flattened gradient."""
        if not self.is_sharded:
            return slice(0, parameter.numel())
        held = self._held.get(parameter)
        return slice(0, 0) if held is None else slice(held.start, held.end)

    def own(self, parameter: nn.Parameter) -> Tensor:
        """This rank's stretch of the gradient, flat; a view."""
        return parameter.main_grad.flatten()[self.stretch(parameter)]  # pyright: ignore[reportAttributeAccessIssue]

    def whole(self, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        """Copies of the whole gradients. Sharded: one all-reduce over the data-parallel ranks."""
        found = []
        for parameter in parameters:
            gradient = torch.zeros_like(parameter, dtype=torch.float32)
            gradient.view(-1)[self.stretch(parameter)] = self.own(parameter).float()
            found.append(gradient)
        if self.is_sharded and found:
            group: Any = parallel_state.get_data_parallel_group()
            sum_coalesced(found, group)
        return found


@dataclass
class Position:
    """How far a run has come. The data position is `consumed_samples`; all are counts over all ranks."""

    iteration: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0


@dataclass
class TrainingState:
    """One rank's part of a run: everything that a checkpoint saves and a resumed run restores.

    `model_chunks` are wrapped in megatron-core's DistributedDataParallel, one for each virtual pipeline stage.
    """

    config: RunConfig
    shape: ModelShape
    model_chunks: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    schedule: OptimizerParamScheduler
    position: Position = field(default_factory=Position)
