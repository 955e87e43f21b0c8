"""megatron-core's schedule of each pipeline stage, run with chunks that compute nothing.

What is left are the marks of forwards and backwards, and the messages between them. The fake world has one rank for
each stage, and the messages are of one number: their true shapes are put in by `schedule.py`.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from megatron.core.enums import ModelType
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import nn

from megatron_peft.adapters.attach import is_targeted
from megatron_peft.config import ParallelConfig, RunConfig
from megatron_peft.models.gpt import transformer_config
from megatron_peft.models.kernels import Training
from megatron_peft.models.shape import ModelShape
from megatron_peft.rehearsal.record import Entry
from megatron_peft.rehearsal.recording import Recorder, group_names
from megatron_peft.runtime.fake_ranks import fake_world, idle_steps, shapes_as_asked, watched_batches, watched_schedule
from megatron_peft.runtime.launch import start_model_parallel, stop_model_parallel


@dataclass(frozen=True)
class StageOutline:
    """A pipeline stage before it is rehearsed.

    Args:
        contents: equal for two stages whose ranks compute and send the same in a microbatch.
        schedule: marks and messages, in the order of the program. The peers of messages are stages.
    """

    contents: Hashable
    schedule: tuple[Entry, ...]


class _IdleChunk(nn.Module):
    """A chunk of a model, for a schedule that asks for its configuration alone."""

    model_type = ModelType.encoder_or_decoder

    def __init__(self, config: Any, chunk: int | None) -> None:
        super().__init__()
        self.config, self.vp_stage = config, chunk


def outline_stages(config: RunConfig, shape: ModelShape) -> list[StageOutline]:
    """What each pipeline stage holds, and its schedule."""
    return [_outline(config, shape, stage) for stage in range(config.parallel.pipeline_model_parallel_size)]


def _outline(config: RunConfig, shape: ModelShape, stage: int) -> StageOutline:
    parallel = config.parallel
    num_stages, num_chunks = parallel.pipeline_model_parallel_size, parallel.num_virtual_stages(shape.num_layers)
    core = transformer_config(shape, config.model.bf16, config.model.transformer, parallel, Training.of(config))
    indices: list[int | None] = [*range(num_chunks)] if num_chunks else [None]
    with fake_world(stage, num_stages):
        start_model_parallel(ParallelConfig(1, num_stages, world_size=num_stages), config.training.seed, num_chunks)
        contents = tuple(_contents(config, core, stage, index) for index in indices)
        schedule = _schedule(config, core, indices)
        stop_model_parallel()
    return StageOutline(contents, schedule)


def _contents(config: RunConfig, core: Any, stage: int, chunk: int | None) -> Hashable:
    """What makes a chunk's program: whether it has the embedding or the loss, and which layers have adapters.

    Of --pipeline-model-parallel-layout megatron-core finds the layers of the stage that this process is.
    """
    first = get_transformer_layer_offset(core, chunk, stage)
    layers = range(first, first + get_num_layers_to_build(core, chunk, stage))
    patterns, modules = config.peft.target_modules, core.huggingface_modules
    adapted = tuple(
        tuple(name for name in LINEAR_LAYERS if is_targeted(f"decoder.layers.{layer}.{name}", patterns, modules))
        for layer in layers
    )
    has_embedding = stage == 0 and not chunk
    is_last_chunk = chunk in (None, (core.virtual_pipeline_model_parallel_size or 1) - 1)
    has_loss = stage == core.pipeline_model_parallel_size - 1 and is_last_chunk
    return has_embedding, has_loss, adapted if config.peft.trains_adapters else len(layers)


LINEAR_LAYERS = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")


def _schedule(config: RunConfig, core: Any, indices: Sequence[int | None]) -> tuple[Entry, ...]:
    """Of the stage that this process is, with chunks of these indices."""
    core.hidden_size, core.sequence_parallel = 1, False
    recorder = Recorder(group_names(), keeps_work=False)
    core.finalize_model_grads_func = lambda *args, **kwargs: recorder.mark("finish")
    chunks: list[Any] = [_IdleChunk(core, index) for index in indices]
    iterators: list[Any] = [iter(()) for _ in chunks]
    with shapes_as_asked(), idle_steps(), watched_schedule(recorder.mark), watched_batches(recorder.batch), recorder:
        get_forward_backward_func()(
            forward_step_func=None,
            data_iterator=iterators if config.parallel.is_interleaved else iterators[0],
            model=chunks,
            num_microbatches=config.num_microbatches,
            seq_length=1,
            micro_batch_size=1,
        )
    return recorder.entries()
