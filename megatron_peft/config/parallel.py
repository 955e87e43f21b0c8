"""How a run is laid out on processes: tensor-parallel ranks, pipeline stages, their layers, and replicas."""

import re
from dataclasses import dataclass
from typing import Literal

from megatron_peft.config.errors import Checked, Requirements, flag, option

UNEVEN_STAGES = ("decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers")
ACCOUNTED_STAGES = ("account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split")
CHUNK, LAYOUT = "num_layers_per_virtual_pipeline_stage", "pipeline_model_parallel_layout"


@dataclass(frozen=True)
class ParallelConfig(Checked):
    """How the model and the batch are split over `world_size` processes."""

    tensor_model_parallel_size: int = option(1, "number of ranks each linear layer is split over", check="positive")
    pipeline_model_parallel_size: int = option(1, "number of pipeline stages", check="positive")
    num_layers_per_virtual_pipeline_stage: int | None = option(
        None, "interleaved schedule: number of layers in a virtual stage", check="positive"
    )
    decoder_first_pipeline_num_layers: int | None = option(
        None, "number of layers in the first pipeline stage, if it differs from the others", check="positive"
    )
    decoder_last_pipeline_num_layers: int | None = option(
        None, "number of layers in the last pipeline stage, if it differs from the others", check="positive"
    )
    account_for_embedding_in_pipeline_split: bool = option(
        False, "count the embedding as a layer when layers are divided among pipeline stages"
    )
    account_for_loss_in_pipeline_split: bool = option(
        False, "count the output layer and the loss as a layer when layers are divided among pipeline stages"
    )
    pipeline_model_parallel_layout: str | None = option(
        None,
        "what each pipeline stage holds, in order: E embedding, t layer, L loss; | between stages, *N repeats, ( ) "
        "groups, as in 'Ettt|(tttt|)*14tttL'; N times as many stages as --pipeline-model-parallel-size interleave",
        check="not_empty",
        metavar="LAYOUT",
    )
    sequence_parallel: bool = option(
        False,
        "split the sequence over the tensor-parallel ranks outside the linear layers; no effect with one such rank",
    )
    distributed_backend: Literal["nccl", "gloo"] | None = option(None, "default: nccl with CUDA, gloo without")
    distributed_timeout_minutes: float = option(10, "minutes a rank waits for the others at most", check="positive")
    distributed_timeout_seconds_after_init: int | None = option(
        None, "seconds that a rank waits after the first iteration: more than a save takes", check="positive"
    )
    world_size: int = 1

    @property
    def seconds_to_wait(self) -> float:
        """How long a rank waits for the others in training."""
        return self.distributed_timeout_seconds_after_init or 60 * self.distributed_timeout_minutes

    def check(self, require: Requirements) -> None:
        tp, pp = self.tensor_model_parallel_size, self.pipeline_model_parallel_size
        require(
            tp * pp <= 0 or self.world_size % (tp * pp) == 0,
            f"{self.world_size} processes cannot hold --tensor-model-parallel-size {tp} x "
            f"--pipeline-model-parallel-size {pp} ranks: start a multiple of {tp * pp}, or lower one of the two.",
        )
        require(
            not self.sequence_parallel or tp > 1, "--sequence-parallel: only with --tensor-model-parallel-size above 1."
        )
        uneven, divided = self._given(*UNEVEN_STAGES), self._given(CHUNK, *ACCOUNTED_STAGES)
        ways = [way for way in (uneven, divided, self._given(LAYOUT)) if way]
        named = ", ".join(flag(name) for way in ways for name in way)
        require(pp > 1 or not ways, f"{named}: only with --pipeline-model-parallel-size above 1.")
        require(len(ways) <= 1, f"{named}: mutually exclusive ways to divide layers among pipeline stages.")
        layout = self.pipeline_model_parallel_layout
        if layout is None:
            return
        is_short, shown = len(layout) <= 1000 and not re.search(r"\d{4}", layout), f"{flag(LAYOUT)} {layout[:80]}"
        stages = stages_of_layout(layout) if is_short else []
        require(
            re.fullmatch(r"E[t|]*L", "|".join(stages)) is not None,
            f"{shown} must hold E (embedding), t (layer) and L (loss) in this order, with | between stages, as in "
            f"'Ettt|(tttt|)*14tttL', and repeat less than 1,000 times.",
        )
        require(
            pp <= 0 or len(stages) % pp == 0,
            f"{shown} has {len(stages)} stages, which --pipeline-model-parallel-size {pp} does not divide.",
        )

    def _given(self, *names: str) -> list[str]:
        return [name for name in names if getattr(self, name)]

    @property
    def is_interleaved(self) -> bool:
        """Whether a pipeline rank holds several chunks of the model."""
        if self.pipeline_model_parallel_layout is not None:
            return len(stages_of_layout(self.pipeline_model_parallel_layout)) > self.pipeline_model_parallel_size
        return self.num_layers_per_virtual_pipeline_stage is not None

    def num_divided(self, num_layers: int) -> int:
        """Layers to divide among the stages, with the embedding and the loss where they count as one."""
        return num_layers + len(self._given(*ACCOUNTED_STAGES))

    def num_virtual_stages(self, num_layers: int) -> int | None:
        """Model chunks of one pipeline rank under the interleaved schedule; None for the plain one."""
        if not self.is_interleaved:
            return None
        pp, chunk = self.pipeline_model_parallel_size, self.num_layers_per_virtual_pipeline_stage
        if self.pipeline_model_parallel_layout is not None:
            return len(stages_of_layout(self.pipeline_model_parallel_layout)) // pp
        return self.num_divided(num_layers) // pp // (chunk or 1)

    @property
    def data_parallel_size(self) -> int:
        """Replicas of the model: ranks that are neither tensor- nor pipeline-parallel."""
        return self.world_size // (self.tensor_model_parallel_size * self.pipeline_model_parallel_size)


def stages_of_layout(layout: str) -> list[str]:
    """What each stage of a --pipeline-model-parallel-layout holds: `E|(tt|)*2L` -> ["E", "tt", "tt", "L"].

    As megatron-core reads it, which would have to import torch for that.
    """
    unrolled = layout.replace(",", "")
    for repeated in (r"\(([^)]+)\)\*(\d+)", r"(.)\*(\d+)"):
        unrolled = re.sub(repeated, lambda match: match[1] * int(match[2]), unrolled)
    return unrolled.split("|")
