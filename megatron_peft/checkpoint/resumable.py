"""What a checkpoint needs to see of a run. `training.state.TrainingState` is one."""

from typing import Protocol

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_peft.config import RunConfig
from megatron_peft.models.shape import ModelShape


class Counters(Protocol):
    """How far a run has come, counted over all ranks; a dataclass of integers."""

    iteration: int
    consumed_samples: int
    consumed_tokens: int


class Resumable(Protocol):
    """One rank's part of a run. Attributes are those of `TrainingState`."""

    @property
    def config(self) -> RunConfig: ...

    @property
    def shape(self) -> ModelShape: ...

    @property
    def model_chunks(self) -> list[DistributedDataParallel]: ...

    @property
    def optimizer(self) -> MegatronOptimizer: ...

    @property
    def schedule(self) -> OptimizerParamScheduler: ...

    @property
    def position(self) -> Counters: ...
