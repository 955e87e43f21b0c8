"""One forward through all pipeline stages of a replica, and what its last stage tells the others.

Training has megatron-core's schedules for this. A token of generation is a single microbatch with a cache, so here each
stage just waits for the one before it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from torch import Tensor


def run_stages(
    model_chunks: Sequence[GPTModel], message: tuple[int, ...], forward: Callable[[GPTModel], Tensor]
) -> Tensor | None:
    """Run every chunk of every stage in order. A collective of the pipeline.

    Args:
        model_chunks: this rank's, one for each virtual stage.
        message: shape of what a stage hands on.
        forward: of one chunk, once it has its input.

    Returns:
        The output of the last chunk on its rank, None elsewhere.
    """
    for chunk in model_chunks:
        if not chunk.pre_process:
            chunk.set_input_tensor(_receive(chunk, message))
        output = forward(chunk)
        if chunk.post_process:
            return output
        _send(output)
    return None


def broadcast_from_last_stage(values: Tensor) -> Tensor:
    """`values` of the last stage's first tensor-parallel rank, in place, on every rank of the replica.

    All of them must see the very same tokens: one that ended a row on its own would wait for the others forever.
    """
    pipeline: Any = parallel_state.get_pipeline_model_parallel_group()
    tensor_parallel: Any = parallel_state.get_tensor_model_parallel_group()
    _broadcast(values, parallel_state.get_pipeline_model_parallel_last_rank(), pipeline)
    _broadcast(values, parallel_state.get_tensor_model_parallel_src_rank(), tensor_parallel)
    return values


def _broadcast(values: Tensor, source: int, group: dist.ProcessGroup) -> None:
    if group.size() > 1:
        dist.broadcast(values, source, group=group)


def _receive(chunk: GPTModel, shape: tuple[int, ...]) -> Tensor:
    hidden = torch.empty(shape, dtype=chunk.config.pipeline_dtype, device=torch.cuda.current_device())
    dist.recv(hidden, parallel_state.get_pipeline_model_parallel_prev_rank(), group=_pipeline())
    return hidden


def _send(hidden: Tensor) -> None:
    dist.send(hidden.contiguous(), parallel_state.get_pipeline_model_parallel_next_rank(), group=_pipeline())


def _pipeline() -> dist.ProcessGroup:
    group: Any = parallel_state.get_pipeline_model_parallel_group()
    return group
