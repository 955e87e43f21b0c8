"""Short runs that are saved, killed and resumed, called on ranks by the tests of this folder; a run's record."""

import dataclasses
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as torch_checkpoint
from megatron.core import parallel_state

from megatron_peft.checkpoint.run_record import RunRecord
from megatron_peft.checkpoint.state import MOMENTS, TrainingState, optimizer_params
from megatron_peft.config import ConfigurationError, ParallelConfig, RunConfig
from megatron_peft.models.families import read_shape
from megatron_peft.models.shape import ModelShape, RopeScaling
from megatron_peft.runtime.launch import seed_generators, start_model_parallel, stop_model_parallel
from megatron_peft.training.run import build_state
from megatron_peft.training.step import train_step
from tests.training.layout_runs import Job, data_of, merged

NUM_STEPS = 3
Settings = dict[str, dict[str, Any]]
_layouts: list[tuple[ParallelConfig, int | None]] = []  # of this process, one after the other


@dataclasses.dataclass(frozen=True)
class Files:
    """Folders of one world's tests: of base models (`base`, `tied`, `other`), the data, and a place to write."""

    bases: str
    data: str
    work: str


def configure(files: Files, settings: Settings) -> RunConfig:
    """A run of NUM_STEPS steps of four samples."""
    plain = {"model": {"pretrained_checkpoint": "base"}, "peft": {"lora_rank": 4}, "training": {"global_batch_size": 4}}
    groups = merged(plain, settings)
    base = str(Path(files.bases, groups["model"].pop("pretrained_checkpoint")))
    job = Job("", base, files.data, num_steps=NUM_STEPS, **groups)
    return job.config(dist.get_world_size() if dist.is_initialized() else 1)


@dataclasses.dataclass
class Run:
    state: TrainingState
    data: Any

    @property
    def chunks(self) -> list[torch.nn.Module]:
        return [chunk.module for chunk in self.state.model_chunks]

    def train(self, num_steps: int) -> list[float]:
        """Losses of the next steps."""
        losses = []
        self.data.train.consumed_samples = self.state.position.consumed_samples
        steps = iter(self.data.train)
        for _ in range(num_steps):
            report = train_step(self.state, next(steps))
            self.state.advance(report.num_positions)
            losses.append(report.loss)
        return losses

    def snapshot(self) -> dict[str, torch.Tensor]:
        """Copies of everything trainable on this rank: parameters, the optimizer's state, rates, generators."""
        entries = self.state.entries
        found = {entry.key: entry.data.detach().clone() for entry in entries}
        for param, entry in optimizer_params(self.state.optimizer, entries):
            found[f"master {entry.key}"] = param.master.detach().clone()
            found[f"steps {entry.key}"] = torch.tensor(param.steps)
            found[f"rate {entry.key}"] = torch.tensor([param.group["lr"], param.group["weight_decay"]])
            found.update({f"{m} {entry.key}": param.state[m].clone() for m in MOMENTS if m in param.state})
        found["torch generator"] = torch.get_rng_state()
        found["python generator"] = torch.tensor(random.getstate()[1])
        found["numpy generator"] = torch.tensor(np.random.get_state()[1].astype(np.int64))
        return found


def _lay_out(config: RunConfig, num_stages: int | None) -> None:
    """Groups cost more than such a run: those of the run before are kept if the layout is the same."""
    layout = config.parallel, num_stages
    if parallel_state.is_initialized() and _layouts[-1:] == [layout]:
        seed_generators(config.training.seed)
        return
    if parallel_state.is_initialized():
        stop_model_parallel()
    start_model_parallel(config.parallel, config.training.seed, num_stages)
    _layouts.append(layout)


def start(config: RunConfig, disturbed: bool = False) -> Run:
    """A fresh run, as a new process builds it; `disturbed` leaves no generator where its seed has put it."""
    shape = read_shape(config.model.pretrained_checkpoint)
    _lay_out(config, config.parallel.num_virtual_stages(shape.num_layers))
    data = data_of(config)
    state = build_state(config, shape, data.train_iters)
    if disturbed:
        torch.rand(100), random.random(), np.random.rand()
    return Run(state, data)


def differences(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> list[str]:
    """Names of what is not bit for bit the same."""
    names = sorted(left.keys() | right.keys())
    return [name for name in names if not (name in left and name in right and torch.equal(left[name], right[name]))]


def stored_tensors(folder: str | Path, shared: bool = False) -> dict[str, torch.Tensor]:
    """The tensors of a --save folder's only checkpoint, as torch reads them, without generators; `shared`: a share."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if shared else (0, 1)
    checkpoint = next(Path(folder).glob("iter_*"))
    stored = torch_checkpoint.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    own = {key: one for key, one in stored.items() if key[:4] != "rng." and sum(key.encode()) % size == rank}
    tensors = {key: torch.empty(one.size, dtype=one.properties.dtype) for key, one in own.items()}
    torch_checkpoint.load(tensors, checkpoint_id=checkpoint, no_dist=True)
    return {key: torch.atleast_1d(tensor) for key, tensor in tensors.items()}


def attempt(action: Callable[[], Any]) -> str:
    """The message of the ConfigurationError that it raises, or nothing."""
    try:
        action()
    except ConfigurationError as error:
        return f"{type(error).__name__}: {error}"
    return ""


# A run's record, for tests without ranks.

BIASES = frozenset({"linear_qkv", "linear_fc2"})
SHAPE = ModelShape("llama", 4, 96, 160, 6, 2, 20, 1001, 256, linear_biases=BIASES, rope_scaling=RopeScaling())
RATE = {"max_lr": 5e-3, "min_lr": 0.0, "lr_warmup_steps": 0, "lr_decay_style": "cosine", "lr_decay_steps": 12}
DECAY = {"start_wd": 0.01, "end_wd": 0.01, "wd_incr_style": "constant", "wd_incr_steps": 12}
LEFT_OUT = {"init_lr": 0.0, "wsd_decay_steps": 0, "lr_wsd_decay_style": "exponential"}  # of megatron-core's state
SCHEDULE = {"num_steps": 8, **RATE, **LEFT_OUT, **DECAY}


def make_config(**groups: dict[str, Any]) -> RunConfig:
    return configure(Files("bases", "pairs.jsonl", "work"), merged({"checkpoint": {"load": "runs"}}, groups))


def make_record(**changes: Any) -> RunRecord:
    record = RunRecord(
        config=make_config(),
        shape=SHAPE,
        position={"iteration": 2, "consumed_samples": 8, "consumed_tokens": 100},
        adapted_layers=("decoder.layers.0.mlp.linear_fc1",),
        base_fingerprint={"config.json": "12", "model.safetensors": "34"},
        schedule=SCHEDULE,
        optimizer_steps={"decoder.layers.0.mlp.linear_fc1.adapter.A": 2},
    )
    return dataclasses.replace(record, **changes)
