"""What a training run is made of, and how far it has come."""

from dataclasses import dataclass, field

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_peft.config import RunConfig
from megatron_peft.models.shape import ModelShape


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
