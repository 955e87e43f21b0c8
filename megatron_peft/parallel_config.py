"""How a run is split over processes."""

from dataclasses import dataclass
from typing import Literal

from megatron_peft.config.errors import Requirements


@dataclass(frozen=True)
class ParallelConfig:
    """How the model and the batch are split over `world_size` processes."""

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    num_layers_per_virtual_pipeline_stage: int | None = None
    decoder_first_pipeline_num_layers: int | None = None
    decoder_last_pipeline_num_layers: int | None = None
    sequence_parallel: bool = False
    distributed_backend: Literal["nccl", "gloo"] | None = None  # None: nccl with CUDA, else gloo
    distributed_timeout_minutes: float = 10
    world_size: int = 1

    def __post_init__(self) -> None:
        tp, pp = self.tensor_model_parallel_size, self.pipeline_model_parallel_size
        uneven = bool(self.decoder_first_pipeline_num_layers or self.decoder_last_pipeline_num_layers)
        with Requirements(self) as require:
            require.positive(
                "tensor_model_parallel_size",
                "pipeline_model_parallel_size",
                "num_layers_per_virtual_pipeline_stage",
                "decoder_first_pipeline_num_layers",
                "decoder_last_pipeline_num_layers",
                "distributed_timeout_minutes",
            )
            require(
                tp * pp <= 0 or self.world_size % (tp * pp) == 0,
                f"{self.world_size} processes cannot hold --tensor-model-parallel-size {tp} x "
                f"--pipeline-model-parallel-size {pp} = {tp * pp} ranks a replica: start a multiple of {tp * pp} "
                f"(torchrun --nproc-per-node), or lower one of the two.",
            )
            require(
                not self.sequence_parallel or tp > 1,
                "--sequence-parallel splits the sequence over tensor-parallel ranks: it needs "
                "--tensor-model-parallel-size above 1.",
            )
            require(
                self.num_layers_per_virtual_pipeline_stage is None or pp > 1,
                "--num-layers-per-virtual-pipeline-stage interleaves pipeline stages: it needs "
                "--pipeline-model-parallel-size above 1.",
            )
            require(
                not uneven or pp > 1,
                "--decoder-first-pipeline-num-layers and --decoder-last-pipeline-num-layers need "
                "--pipeline-model-parallel-size above 1.",
            )
            require(
                not uneven or self.num_layers_per_virtual_pipeline_stage is None,
                "--num-layers-per-virtual-pipeline-stage needs stages of equal size: leave out "
                "--decoder-first-pipeline-num-layers and --decoder-last-pipeline-num-layers.",
            )

    @property
    def data_parallel_size(self) -> int:
        return self.world_size // (self.tensor_model_parallel_size * self.pipeline_model_parallel_size)
