"""Short training runs of tests, at several layouts in one world: jobs for the engine of `megatron-peft certify`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist

from megatron_peft.certify import runs
from megatron_peft.certify.comparison import compare_curves, compare_runs
from megatron_peft.certify.runs import RankReport
from megatron_peft.checkpoint.state import TrainingState
from megatron_peft.config import RunConfig, make_run
from megatron_peft.data.build import Data
from megatron_peft.data.tokenizers import build_tokenizer
from megatron_peft.models.families import read_shape
from megatron_peft.runtime.launch import model_parallel, start_world
from megatron_peft.training.run import data_of_rank
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
        values: dict[str, Any] = {"world_size": world_size, "pretrained_checkpoint": self.base}
        values |= {"train_data_path": path, "valid_data_path": path, "tokenizer_type": "NullTokenizer"}
        values |= {"seq_length": 32, "vocab_size": VOCAB_SIZE - 1, "num_workers": 0, "transformer": self.transformer}
        values |= {"micro_batch_size": 2, "global_batch_size": 8, "train_iters": self.num_steps}
        values |= {"eval_iters": 2}  # five of them would be a third of a short run
        values |= {"lr": 5e-3, "clip_grad": 0.5, "lr_decay_style": "cosine", **self.parallel, **self.model, **self.peft}
        values |= {**self.data_settings, **self.training, **self.optimizer, **self.checkpoint, **self.logging}
        return make_run(**values)


def run_jobs(jobs: list[Job]) -> dict[str, RankReport]:
    """Called on every rank."""
    start_world()
    return run_each(jobs)


def run_each(jobs: list[Job]) -> dict[str, RankReport]:
    """Every job in the present world."""
    size = dist.get_world_size()
    return {job.name: runs.run_job(runs.Job(job.config(size), read_shape(job.base))) for job in jobs}


def differences(ranks: Sequence[RankReport], alone: RankReport) -> dict[str, tuple[str, ...]]:
    """What a certificate would name of a layout, and rates and stops too; its microbatches may be of another size."""
    lines = [*compare_runs(ranks, alone), *compare_curves(ranks[0].curve, alone.curve)]
    return {line.name: line.problems for line in lines if line.problems and line.name != "samples of each step"}


@contextmanager
def built(job: Job) -> Iterator[tuple[TrainingState, Data]]:
    """What `build` gives, in groups of its own in the present world."""
    config = job.config(dist.get_world_size())
    num_stages = config.parallel.num_virtual_stages(read_shape(job.base).num_layers)
    with model_parallel(config.parallel, config.training.seed, num_stages):
        yield build(config)


def build(config: RunConfig) -> tuple[TrainingState, Data]:
    """Model, optimizer and data of a run in the present groups."""
    run = runs.Run(config, read_shape(config.model.pretrained_checkpoint))
    return run.state, run.data


def data_of(config: RunConfig) -> Data:
    tokenizer = build_tokenizer(config.data, None)
    return data_of_rank(config, tokenizer, read_shape(config.model.pretrained_checkpoint))
