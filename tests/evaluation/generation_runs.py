"""Greedy generation at several layouts; started on ranks by test_generation.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state

from megatron_peft.adapters.attach import attach_adapters
from megatron_peft.config import ModelConfig, ParallelConfig, PeftConfig
from megatron_peft.conversion.loader import load_pretrained
from megatron_peft.evaluation.generation import SEQUENCE_PARALLEL_SWITCHES, Greedy, generate
from megatron_peft.models.gpt import build_model_chunks
from megatron_peft.models.huggingface import read_shape
from megatron_peft.parallel.seeds import generator_for
from megatron_peft.runtime.launch import start_model_parallel, start_world


@dataclass(frozen=True)
class Job:
    """What to generate from, and at which layout (fields of ParallelConfig)."""

    base: str
    prompts: list[list[int]]
    settings: Greedy
    parallel: dict[str, Any] = field(default_factory=dict)
    with_adapters: bool = False


@dataclass(frozen=True)
class Outcome:
    """The answers; whether the model was left as it was found; numbers that `report` was told."""

    answers: list[list[int]]
    left_as_found: bool
    reported: list[int]


def run_jobs(jobs: list[Job]) -> list[Outcome]:
    start_world(ParallelConfig())
    outcomes = []
    for job in jobs:
        parallel = ParallelConfig(**job.parallel, world_size=dist.get_world_size())
        start_model_parallel(parallel, seed=1)
        outcomes.append(_run(job, parallel))
        parallel_state.destroy_model_parallel()
    return outcomes


def _run(job: Job, parallel: ParallelConfig) -> Outcome:
    shape = read_shape(job.base)
    (model,) = chunks = build_model_chunks(shape, ModelConfig(job.base), parallel)
    if job.with_adapters:
        attach_adapters(chunks, PeftConfig(lora_rank=4), seed=1)
        _fill_adapters(model)
    rank, size = parallel_state.get_tensor_model_parallel_rank(), parallel.tensor_model_parallel_size
    load_pretrained(
        chunks, job.base, shape, tensor_parallel_rank=rank, tensor_parallel_size=size, progress=False
    )
    before = _switches(model)
    reported: list[int] = []
    answers = generate(model, job.prompts, job.settings, reported.append)
    return Outcome(answers, _switches(model) == before, reported)


def _fill_adapters(model) -> None:
    """B is zero at the start: give it the same random numbers at any layout."""
    for name, module in model.named_modules():
        adapter = getattr(module, "adapter", None)
        if adapter is not None:
            whole = adapter.B.new_empty(module.layout.out_features, adapter.B.shape[1])
            whole.normal_(std=0.3, generator=generator_for(1, name))
            adapter.B.data.copy_(module.layout.slice_output(whole))


def _switches(model) -> list[Any]:
    owners = [owner for module in model.modules() for owner in (module, getattr(module, "config", None))]
    names = (*SEQUENCE_PARALLEL_SWITCHES, "training")
    return [getattr(owner, name, None) for owner in owners for name in names]
