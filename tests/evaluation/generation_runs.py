"""Answers and scores at several layouts in one world; started on ranks by the tests beside it."""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_peft.adapters.attach import attach_adapters
from megatron_peft.checkpoint.tensors import global_slices, sharded_parameters
from megatron_peft.config import ModelConfig, ParallelConfig, PeftConfig
from megatron_peft.conversion.pretrained import load_pretrained
from megatron_peft.evaluation import generation
from megatron_peft.evaluation.generation import Continuation, ContinuationScore, GenerationSettings
from megatron_peft.models.families import read_shape
from megatron_peft.models.gpt import build_model_chunks
from megatron_peft.parallel.layout import generator_for
from megatron_peft.runtime.launch import start_model_parallel, start_world, stop_model_parallel

TP2, PP2 = {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}
SP = {**TP2, "sequence_parallel": True}
LAYOUTS = {
    "TP2": TP2,
    "TP2+SP": SP,
    "PP2": PP2,
    "PP2 interleaved": {**PP2, "num_layers_per_virtual_pipeline_stage": 1},
    "TP2xPP2+SP": {**SP, **PP2},
}
GROUPS_OF_FOUR = {"boft_block_size": 2, "boft_factors": 2}
METHODS: dict[str, dict[str, Any] | None] = {
    "base": None,
    "lora": {"method": "lora", "lora_rank": 4},
    "boft": {"method": "boft", **GROUPS_OF_FOUR},
    "boft-input": {"method": "boft", "rotation_side": "input", **GROUPS_OF_FOUR},
    "urnn": {"method": "urnn", "urnn_block_size": 4},
    "hybrid": {"method": "hybrid", "lora_rank": 4, **GROUPS_OF_FOUR},
}


@dataclass(frozen=True)
class Job:
    """What to ask of a model, and at which layout (fields of ParallelConfig)."""

    base: str
    prompts: list[list[int]]
    settings: GenerationSettings
    continuations: list[Continuation] = field(default_factory=list)
    parallel: dict[str, Any] = field(default_factory=dict)
    peft: dict[str, Any] | None = None
    names: list[str] | None = None
    score_batch_size: int = 8


@dataclass(frozen=True)
class Outcome:
    """Answers and scores; whether the model was left as it was found; numbers that `report` was told."""

    answers: list[list[int]]
    scores: list[ContinuationScore]
    left_as_found: bool
    reported: list[int]


def run_jobs(jobs: list[Job]) -> list[Outcome]:
    start_world()
    return [_run(job) for job in jobs]


def _run(job: Job) -> Outcome:
    shape = read_shape(job.base)
    parallel = ParallelConfig(**job.parallel, world_size=dist.get_world_size())
    start_model_parallel(parallel, 1, parallel.num_virtual_stages(shape.num_layers))
    chunks = build_model_chunks(shape, ModelConfig(job.base), parallel)
    if job.peft:
        attach_adapters(chunks, PeftConfig(**job.peft), seed=1)
        _stir_adapters(chunks)
    rank, size = parallel_state.get_tensor_model_parallel_rank(), parallel.tensor_model_parallel_size
    load_pretrained(chunks, job.base, shape, tensor_parallel_rank=rank, tensor_parallel_size=size, progress=False)
    before = _switches(chunks)
    reported: list[int] = []
    answers = generation.generate(chunks, job.prompts, job.settings, reported.append, names=job.names)
    scores = generation.score_continuations(chunks, job.continuations, job.score_batch_size)
    outcome = Outcome(answers, scores, _switches(chunks) == before, reported)
    stop_model_parallel()
    return outcome


@torch.no_grad()
def _stir_adapters(chunks) -> None:
    """Adapters start at no change: add the same random numbers to every global tensor at any layout."""
    trained = {parameter.data_ptr() for chunk in chunks for parameter in chunk.parameters()}
    for entry in sharded_parameters(chunks, only_adapters=True):
        for part in global_slices(entry) if entry.data.data_ptr() in trained else ():
            whole = torch.randn(part.global_shape, generator=generator_for(1, part.key))
            box = zip(part.global_offset, part.local_shape, strict=True)
            part.data.add_(0.2 * whole[tuple(slice(start, start + length) for start, length in box)])


def _switches(chunks) -> list[Any]:
    modules = [module for chunk in chunks for module in chunk.modules()]
    owners = [owner for module in modules for owner in (module, getattr(module, "config", None))]
    names = (*generation.SEQUENCE_PARALLEL_SWITCHES, "training")
    return [getattr(owner, name, None) for owner in owners for name in names]
