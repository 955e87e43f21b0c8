"""From a configuration and its data to everything that a run trains with."""

from collections.abc import Sequence

import torch.distributed as dist
from megatron.core import parallel_state

from megatron_peft.adapters.attach import all_names, attach_adapters
from megatron_peft.config import RunConfig
from megatron_peft.conversion.pretrained import load_pretrained
from megatron_peft.data.batches import Step
from megatron_peft.models.gpt import build_model_chunks
from megatron_peft.models.shape import ModelShape
from megatron_peft.training.lora_ga_start import start_lora_ga
from megatron_peft.training.optimizer import build_optimizer, build_schedule, wrap_data_parallel
from megatron_peft.training.state import TrainingState
from megatron_peft.training.summary import count_parameters, say, training_summary


def build_state(
    config: RunConfig, shape: ModelShape, train_iters: int, start_steps: Sequence[Step] = ()
) -> TrainingState:
    """The base model with its adapters, its pretrained weights, gradient buffers, optimizer and schedule.

    Args:
        shape: of the base model.
        train_iters: iterations of the whole run, for the schedule.
        start_steps: global batches that LoRA-GA starts from; empty where it does not run.

    Raises:
        ConfigurationError: the targets match nothing, the rank is too large, or the weights do not fit the shape.
    """
    chunks = build_model_chunks(shape, config.model, config.parallel)
    adapted: list[str] = []
    if config.peft.trains_adapters:
        adapted = attach_adapters(chunks, config.peft, config.training.seed)
    assert config.model.pretrained_checkpoint is not None
    report = load_pretrained(
        chunks,
        config.model.pretrained_checkpoint,
        shape,
        tensor_parallel_rank=parallel_state.get_tensor_model_parallel_rank(),
        tensor_parallel_size=config.parallel.tensor_model_parallel_size,
        progress=dist.get_rank() == 0,
    )
    say(f"read {report.bytes_read / 2**20:,.1f} MiB of weights on this rank in {report.seconds:.1f} s")
    say(training_summary(config, all_names(adapted), count_parameters(chunks), chunks))
    if start_steps:
        start_lora_ga(chunks, config, start_steps)
    wrapped = wrap_data_parallel(chunks, config)
    optimizer = build_optimizer(wrapped, config)
    return TrainingState(config, shape, wrapped, optimizer, build_schedule(optimizer, config, train_iters))
