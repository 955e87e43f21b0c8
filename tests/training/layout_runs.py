"""Short training runs at several layouts in one world; started on ranks by test_layout.py."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_peft.config import (
    CheckpointConfig,
    DataConfig,
    LoggingConfig,
    ModelConfig,
    OptimizerSettings,
    ParallelConfig,
    PeftConfig,
    RunConfig,
    TrainingConfig,
)
from megatron_peft.data.build import Data, build_data
from megatron_peft.data.tokenizers import build_tokenizer
from megatron_peft.models.gpt import num_virtual_stages
from megatron_peft.models.huggingface import read_shape
from megatron_peft.runtime.launch import start_model_parallel, start_world, stop_model_parallel
from megatron_peft.training.build import build_state
from megatron_peft.training.evaluate import validation_loss, whole_parameters
from megatron_peft.training.mixture import mixtures
from megatron_peft.training.start import first_steps
from megatron_peft.training.state import TrainingState
from megatron_peft.training.step import train_step
from tests.tiny_llama import VOCAB_SIZE

NUM_STEPS = 20


@dataclass(frozen=True)
class Job:
    """A name for it, the base and data, and what differs from the plain run (fields of the config's groups)."""

    name: str
    base: str
    data: str
    parallel: dict[str, Any] = dataclasses.field(default_factory=dict)
    peft: dict[str, Any] = dataclasses.field(default_factory=dict)
    optimizer: dict[str, Any] = dataclasses.field(default_factory=dict)
    transformer: dict[str, Any] = dataclasses.field(default_factory=dict)
    data_settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    model: dict[str, Any] = dataclasses.field(default_factory=dict)
    training: dict[str, Any] = dataclasses.field(default_factory=dict)
    checkpoint: dict[str, Any] = dataclasses.field(default_factory=dict)
    logging: dict[str, Any] = dataclasses.field(default_factory=dict)
    num_steps: int = NUM_STEPS

    def config(self, world_size: int) -> RunConfig:
        return RunConfig(
            parallel=ParallelConfig(**self.parallel, world_size=world_size),
            model=ModelConfig(self.base, transformer=self.transformer, **self.model),
            peft=PeftConfig(**self.peft),
            data=DataConfig(
                train_data_path=(self.data,),
                valid_data_path=(self.data,),
                tokenizer_type="NullTokenizer",
                num_workers=0,
                **{"seq_length": 32, "vocab_size": VOCAB_SIZE - 1, **self.data_settings},
            ),
            training=TrainingConfig(
                **{"micro_batch_size": 2, "global_batch_size": 8, "train_iters": self.num_steps, **self.training}
            ),
            optimizer=OptimizerSettings(**{"lr": 5e-3, "clip_grad": 0.5, "lr_decay_style": "cosine", **self.optimizer}),
            checkpoint=CheckpointConfig(**self.checkpoint),
            logging=LoggingConfig(**self.logging),
        )


@dataclass(frozen=True)
class Curve:
    """Losses, gradient norms, rates and completion tokens by step; the validation loss and lambda by layer at the end.

    `replicas_agree`: after the last step, before anything else, all data-parallel ranks hold the same parameters where
    a checkpoint would be written.
    """

    losses: list[float]
    grad_norms: list[float]
    validation_loss: float
    learning_rates: list[float]
    num_tokens: list[int]
    lambdas: dict[str, float]
    replicas_agree: bool


def run_jobs(jobs: list[Job]) -> dict[str, Curve]:
    """Every job, one after the other, in one world."""
    start_world(ParallelConfig())
    return run_each(jobs)


def run_each(jobs: list[Job]) -> dict[str, Curve]:
    """Every job in the present world, in groups of its own."""
    curves = {}
    for job in jobs:
        curves[job.name] = run(job.config(dist.get_world_size()))
        stop_model_parallel()
    return curves


def run(config: RunConfig) -> Curve:
    shape = read_shape(config.model.pretrained_checkpoint)
    start_model_parallel(config.parallel, config.training.seed, num_virtual_stages(shape, config.parallel))
    state, data = build(config)
    steps = iter(data.train)
    reports = [train_step(state, next(steps)) for _ in range(config.training.train_iters)]
    agree = replicas_agree(state)
    loss = validation_loss(state.model_chunks, data.valid)
    mixed = mixtures(state)
    return Curve(
        losses=[report.loss for report in reports],
        grad_norms=[report.grad_norm for report in reports],
        validation_loss=loss,
        learning_rates=[report.learning_rate for report in reports],
        num_tokens=[report.num_tokens for report in reports],
        lambdas=mixed.by_layer if mixed else {},
        replicas_agree=agree,
    )


def replicas_agree(state: TrainingState) -> bool:
    with whole_parameters(state.model_chunks):
        trained = [p for chunk in state.model_chunks for p in chunk.parameters() if p.requires_grad]
        largest = torch.cat([torch.zeros(0).double(), *(p.detach().double().flatten() for p in trained)])
    smallest, group = largest.clone(), parallel_state.get_data_parallel_group()
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    dist.all_reduce(smallest, dist.ReduceOp.MIN, group=group)
    return torch.equal(largest, smallest)


def build(config: RunConfig) -> tuple[TrainingState, Data]:
    """Model, optimizer and data of a run in the present groups."""
    data = data_of(config)
    shape = read_shape(config.model.pretrained_checkpoint)
    return build_state(config, shape, data.train_iters, first_steps(config, data.train)), data


def data_of(config: RunConfig) -> Data:
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    return build_data(config, build_tokenizer(config.data, None), data_parallel_rank=rank, data_parallel_size=size)
