"""Logits and answers of a Bloom at several layouts in one world; started on ranks by test_bloom.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from torch import Tensor

from megatron_peft.config import ModelConfig, ParallelConfig
from megatron_peft.conversion.loader import load_pretrained
from megatron_peft.evaluation.generation import GenerationSettings, generate
from megatron_peft.models.gpt import build_model_chunks, num_virtual_stages
from megatron_peft.models.huggingface import read_shape
from megatron_peft.runtime.launch import start_model_parallel, start_world, stop_model_parallel


@dataclass(frozen=True)
class Job:
    """A folder, its layout (fields of ParallelConfig), microbatches [b, s] of one size, and what to continue."""

    base: str
    parallel: dict[str, Any]
    tokens: list[Tensor]
    prompts: list[list[int]] = field(default_factory=list)
    settings: GenerationSettings = GenerationSettings(frozenset(), max_new_tokens=1)


def run_jobs(jobs: list[Job]) -> list[tuple[list[Tensor], list[list[int]]]]:
    """Of each job the logits [b, s, vocabulary] (on the last pipeline stage) and the answers."""
    start_world(ParallelConfig())
    return [_run(job) for job in jobs]


def _run(job: Job) -> tuple[list[Tensor], list[list[int]]]:
    shape = read_shape(job.base)
    parallel = ParallelConfig(**job.parallel, world_size=dist.get_world_size())
    start_model_parallel(parallel, 1, num_virtual_stages(shape, parallel))
    chunks = build_model_chunks(shape, ModelConfig(job.base), parallel)
    rank, size = parallel_state.get_tensor_model_parallel_rank(), parallel.tensor_model_parallel_size
    load_pretrained(chunks, job.base, shape, tensor_parallel_rank=rank, tensor_parallel_size=size, progress=False)
    logits = [x[..., : shape.vocab_size].clone() for x in _logits(chunks, job.tokens)]
    answers = generate(chunks, job.prompts, job.settings) if job.prompts else []
    stop_model_parallel()
    return logits, answers


def _logits(chunks, microbatches: list[Tensor]) -> list[Tensor]:
    iterators = [iter(microbatches) for _ in chunks]
    rows, positions = microbatches[0].shape
    return get_forward_backward_func()(
        forward_step_func=_forward,
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=chunks,
        num_microbatches=len(microbatches),
        seq_length=positions,
        micro_batch_size=rows,
        forward_only=True,
        collect_non_loss_data=True,
    )


def _forward(microbatches, model):
    tokens = next(microbatches)
    logits = model(tokens, torch.arange(tokens.shape[1]).expand_as(tokens), attention_mask=None)
    return logits, lambda output, non_loss_data: gather_from_tensor_model_parallel_region(output)
