"""megatron-core's schedule of each pipeline stage, run with chunks that compute nothing.

What is left are the marks of forwards and backwards, and the messages between them. The fake world has one rank for
each stage, and the messages are of one number: their true shapes are put in by `schedule.py`.
"""

from typing import Any

from megatron.core.enums import ModelType
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import nn

from megatron_peft.config import ParallelConfig, RunConfig
from megatron_peft.models.gpt import transformer_config
from megatron_peft.models.kernels import Training
from megatron_peft.models.shape import ModelShape
from megatron_peft.rehearsal.program import Entry
from megatron_peft.rehearsal.recorder import Recorder, group_names
from megatron_peft.runtime.fake_ranks import fake_world, idle_steps, shapes_as_asked, watched_batches, watched_schedule
from megatron_peft.runtime.launch import model_parallel


def schedules_of_stages(config: RunConfig, shape: ModelShape) -> list[tuple[Entry, ...]]:
    """Marks and messages of each pipeline stage, in the order of the program. The peers of messages are stages."""
    return [_schedule(config, shape, stage) for stage in range(config.parallel.pipeline_model_parallel_size)]


def _schedule(config: RunConfig, shape: ModelShape, stage: int) -> tuple[Entry, ...]:
    parallel, transformer = config.parallel, config.model.transformer
    num_stages, num_chunks = parallel.pipeline_model_parallel_size, parallel.num_virtual_stages(shape.num_layers)
    core: Any = transformer_config(shape, config.model.bf16, transformer, parallel, Training.of(config))
    core.hidden_size, core.sequence_parallel = 1, False
    of_stages = ParallelConfig(1, num_stages, world_size=num_stages)
    with fake_world(stage, num_stages), model_parallel(of_stages, config.training.seed, num_chunks):
        recorder = Recorder(group_names(), keeps_work=False)
        core.finalize_model_grads_func = lambda *args, **kwargs: recorder.mark("finish")
        chunks: list[Any] = [nn.Module() for _ in range(num_chunks or 1)]
        for number, chunk in enumerate(chunks):  # a schedule asks for the configuration alone
            chunk.config, chunk.vp_stage = core, number if num_chunks else None
            chunk.model_type = ModelType.encoder_or_decoder
        iterators: list[Any] = [iter(()) for _ in chunks]
        with (
            shapes_as_asked(),
            idle_steps(),
            watched_schedule(recorder.mark),
            watched_batches(recorder.batch),
            recorder,
        ):
            get_forward_backward_func()(
                forward_step_func=None,
                data_iterator=iterators if parallel.is_interleaved else iterators[0],
                model=chunks,
                num_microbatches=config.num_microbatches,
                seq_length=1,
                micro_batch_size=1,
            )
    return recorder.entries()
