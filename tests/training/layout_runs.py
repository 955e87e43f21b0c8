"""Short training runs at several layouts in one world, and their comparison with one process's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_peft import config as settings
from megatron_peft.adapters.attach import linear_layers
from megatron_peft.adapters.low_rank import low_rank_part
from megatron_peft.checkpoint.state import whole_parameters
from megatron_peft.config import ParallelConfig, RunConfig
from megatron_peft.data.build import Data, build_data
from megatron_peft.data.tokenizers import build_tokenizer
from megatron_peft.models.families import read_shape
from megatron_peft.runtime.launch import start_model_parallel, start_world, stop_model_parallel
from megatron_peft.training.after_step import mixtures
from megatron_peft.training.lora_ga_start import first_steps
from megatron_peft.training.run import build_state
from megatron_peft.training.state import TrainingState
from megatron_peft.training.step import train_step
from megatron_peft.training.validation import validation_loss
from tests.tiny_llama import VOCAB_SIZE

NUM_STEPS = 20


def merged(*groups: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Settings by group of the configuration; the later ones win."""
    keys = {key for group in groups for key in group}
    return {key: {name: value for group in groups for name, value in group.get(key, {}).items()} for key in keys}


@dataclass(frozen=True)
class Job:
    """A name for it, the base and data, and what differs from the plain run (fields of the config's groups)."""

    name: str
    base: str
    data: str
    parallel: dict[str, Any] = field(default_factory=dict)
    peft: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    transformer: dict[str, Any] = field(default_factory=dict)
    data_settings: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    checkpoint: dict[str, Any] = field(default_factory=dict)
    logging: dict[str, Any] = field(default_factory=dict)
    num_steps: int = NUM_STEPS

    def config(self, world_size: int) -> RunConfig:
        path = (self.data,)
        data = {"train_data_path": path, "valid_data_path": path, "tokenizer_type": "NullTokenizer", "num_workers": 0}
        data |= {"seq_length": 32, "vocab_size": VOCAB_SIZE - 1, **self.data_settings}
        training = {"micro_batch_size": 2, "global_batch_size": 8, "train_iters": self.num_steps}
        training |= {"eval_iters": 2, **self.training}  # five of them would be a third of a short run
        optimizer = {"lr": 5e-3, "clip_grad": 0.5, "lr_decay_style": "cosine", **self.optimizer}
        return RunConfig(
            parallel=ParallelConfig(**self.parallel, world_size=world_size),
            model=settings.ModelConfig(self.base, transformer=self.transformer, **self.model),
            peft=settings.PeftConfig(**self.peft),
            data=settings.DataConfig(**data),
            training=settings.TrainingConfig(**training),
            optimizer=settings.OptimizerSettings(**optimizer),
            checkpoint=settings.CheckpointConfig(**self.checkpoint),
            logging=settings.LoggingConfig(**self.logging),
        )


@dataclass(frozen=True)
class Curve:
    """Losses, gradient norms (whole and by layer), rates and completion tokens by step; validation loss and lambdas.

    `replicas_agree`: after the last step, before anything else, all data-parallel ranks hold the same parameters where
    a checkpoint would be written. `stopped`: after which steps the ranks were to stop; the last rank alone asks for it
    after the second. `started`: the A that the run began with, by layer.
    """

    losses: list[float]
    grad_norms: list[float]
    layer_grad_norms: list[tuple[float, ...]]
    validation_loss: float
    learning_rates: list[float]
    num_tokens: list[int]
    lambdas: dict[str, float]
    replicas_agree: bool
    stopped: list[bool]
    started: dict[str, torch.Tensor] = field(compare=False)

    def equals(self, alone: Curve) -> bool:
        """Whether it is that of one process; else AssertionError says where it is not."""
        np.testing.assert_allclose(self.losses, alone.losses, rtol=1e-5)
        np.testing.assert_allclose(self.grad_norms, alone.grad_norms, rtol=1e-4)
        np.testing.assert_allclose(self.layer_grad_norms, alone.layer_grad_norms, rtol=1e-4)
        np.testing.assert_allclose(self.validation_loss, alone.validation_loss, rtol=1e-5)
        np.testing.assert_allclose(self.learning_rates, alone.learning_rates)
        assert self.lambdas == pytest.approx(alone.lambdas, rel=1e-4)
        assert (self.num_tokens, self.stopped) == (alone.num_tokens, alone.stopped)
        return self.replicas_agree


def run_jobs(jobs: list[Job]) -> dict[str, Curve]:
    start_world()
    return run_each(jobs)


@contextmanager
def built(job: Job) -> Iterator[tuple[TrainingState, Data]]:
    """What `build` gives, in groups of its own in the present world."""
    config = job.config(dist.get_world_size())
    num_stages = config.parallel.num_virtual_stages(read_shape(job.base).num_layers)
    start_model_parallel(config.parallel, config.training.seed, num_stages)
    try:
        yield build(config)
    finally:
        stop_model_parallel()


def run_each(jobs: list[Job]) -> dict[str, Curve]:
    """Every job in the present world."""
    curves = {}
    for job in jobs:
        with built(job) as (state, data):
            curves[job.name] = _curve(state, data)
    return curves


def _curve(state: TrainingState, data: Data) -> Curve:
    layers = [layer for chunk in state.model_chunks for layer in linear_layers(chunk)]
    low_rank = {layer.name: low_rank_part(layer.module.adapter) for layer in layers}
    started = {name: part.A.detach().clone() for name, part in low_rank.items() if part is not None}
    is_last = dist.get_rank() == dist.get_world_size() - 1
    stops = (is_last and number == 1 for number in range(data.train_iters))
    reports = [train_step(state, step, stop, by_layer=True) for stop, step in zip(stops, data.train, strict=False)]
    agree, mixed = replicas_agree(state), mixtures(state)
    return Curve(
        losses=[report.loss for report in reports],
        grad_norms=[report.grad_norm for report in reports],
        layer_grad_norms=[report.layer_grad_norms for report in reports],
        validation_loss=validation_loss(state.model_chunks, data.valid),
        learning_rates=[report.learning_rate for report in reports],
        num_tokens=[report.num_tokens for report in reports],
        lambdas=mixed.by_layer if mixed else {},
        replicas_agree=agree,
        stopped=[report.stop for report in reports],
        started=started,
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
