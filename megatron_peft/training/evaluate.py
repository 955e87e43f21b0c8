"""Validation: the mean loss over the completion tokens of a dataset."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel

from megatron_peft.data.batches import Step
from megatron_peft.training.step import run_schedule


def validation_loss(model_chunks: Sequence[DistributedDataParallel], steps: Iterable[Step]) -> float:
    """Mean token loss over all steps and ranks; the same number on every rank, at any layout."""
    total = torch.zeros(2, dtype=torch.float64, device=torch.cuda.current_device())
    with inference_mode(model_chunks), torch.no_grad():  # megatron-core's schedules would record the graph
        for microbatches in steps:
            total += run_schedule(model_chunks, microbatches, forward_only=True)[:, :2].sum(0)
    if parallel_state.get_tensor_model_parallel_rank() != 0:
        total.zero_()  # tensor-parallel peers compute the same losses: one of them speaks
    dist.all_reduce(total)
    loss_sum, num_tokens = total.tolist()
    return loss_sum / max(num_tokens, 1)


@contextmanager
def inference_mode(model_chunks: Sequence[DistributedDataParallel]) -> Iterator[None]:
    """Dropout off, parameters whole."""
    for chunk in model_chunks:
        chunk.eval()
    try:
        with whole_parameters(model_chunks):
            yield
    finally:
        for chunk in model_chunks:
            chunk.train()


@contextmanager
def whole_parameters(model_chunks: Sequence[DistributedDataParallel]) -> Iterator[None]:
    """With --overlap-param-gather a step's parameters are gathered in the next training forward: gather them now."""
    overlaps = [chunk for chunk in model_chunks if chunk.ddp_config.overlap_param_gather]
    for chunk in overlaps:
        chunk.disable_forward_pre_hook()
    try:
        yield
    finally:
        for chunk in overlaps:
            chunk.enable_forward_pre_hook()
