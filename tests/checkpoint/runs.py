"""Short runs that are saved, killed off and resumed; called on ranks by the tests of this folder."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_peft.checkpoint.load import load_checkpoint
from megatron_peft.checkpoint.optimizer_state import MOMENTS, slots
from megatron_peft.checkpoint.parameters import sharded_parameters
from megatron_peft.checkpoint.save import draft_checkpoint, save_checkpoint
from megatron_peft.config import (
    CheckpointConfig,
    ConfigurationError,
    DataConfig,
    ModelConfig,
    OptimizerSettings,
    ParallelConfig,
    PeftConfig,
    RunConfig,
    TrainingConfig,
)
from megatron_peft.conversion.distributed_files import open_distributed
from megatron_peft.data.build import build_data
from megatron_peft.data.tokenizers import build_tokenizer
from megatron_peft.models.gpt import num_virtual_stages
from megatron_peft.models.huggingface import read_shape
from megatron_peft.runtime.launch import seed_generators, start_model_parallel, stop_model_parallel
from megatron_peft.training.build import build_state
from megatron_peft.training.state import TrainingState
from megatron_peft.training.step import train_step
from tests.tiny_llama import VOCAB_SIZE

NUM_STEPS, STEPS_BEFORE_SAVE = 3, 2
Settings = dict[str, dict[str, Any]]
_layouts: list[tuple[ParallelConfig, int | None]] = []  # of this process, one after the other


@dataclasses.dataclass(frozen=True)
class Files:
    """Folders of one world's tests: of base models (`base`, `tied`, `other`), the data, and a place to write."""

    bases: str
    data: str
    work: str


def merged(*groups: Settings) -> Settings:
    """Settings by group of the configuration; the later ones win."""
    keys = {key for group in groups for key in group}
    return {key: {name: value for group in groups for name, value in group.get(key, {}).items()} for key in keys}


def configure(files: Files, settings: Settings) -> RunConfig:
    """A run of NUM_STEPS steps of four samples."""
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    model = {"pretrained_checkpoint": "base", **settings.get("model", {})}
    model["pretrained_checkpoint"] = str(Path(files.bases, model["pretrained_checkpoint"]))
    return RunConfig(
        parallel=ParallelConfig(**{"world_size": world_size, **settings.get("parallel", {})}),
        model=ModelConfig(**model, transformer=settings.get("transformer", {})),
        peft=PeftConfig(**{"lora_rank": 4, **settings.get("peft", {})}),
        data=DataConfig(
            train_data_path=(files.data,),
            seq_length=32,
            tokenizer_type="NullTokenizer",
            vocab_size=VOCAB_SIZE - 1,
            num_workers=0,
        ),
        training=TrainingConfig(micro_batch_size=2, global_batch_size=4, train_iters=NUM_STEPS, eval_interval=None),
        optimizer=OptimizerSettings(**{"lr": 5e-3, "lr_decay_style": "cosine", **settings.get("optimizer", {})}),
        checkpoint=CheckpointConfig(**settings.get("checkpoint", {})),
    )


@dataclasses.dataclass
class Run:
    """A state and its steps."""

    state: TrainingState
    data: Any

    def train(self, num_steps: int) -> list[float]:
        """Losses of the next steps."""
        position, losses = self.state.position, []
        self.data.train.consumed_samples = position.consumed_samples
        steps = iter(self.data.train)
        for _ in range(num_steps):
            report = train_step(self.state, next(steps))
            position.iteration += 1
            position.consumed_samples += self.state.config.global_batch_size
            position.consumed_tokens += report.num_positions
            losses.append(report.loss)
        return losses

    def snapshot(self) -> dict[str, torch.Tensor]:
        """Copies of everything trainable on this rank: parameters, the optimizer's state, rates, generators."""
        chunks = [chunk.module for chunk in self.state.model_chunks]
        entries = sharded_parameters(chunks, only_adapters=self.state.config.peft.trains_adapters)
        found = {entry.key: entry.data.detach().clone() for entry in entries}
        for slot, entry in slots(self.state.optimizer, entries):
            found[f"master {entry.key}"] = slot.master.detach().clone()
            found[f"steps {entry.key}"] = torch.tensor(slot.steps)
            found[f"rate {entry.key}"] = torch.tensor([slot.group["lr"], slot.group["weight_decay"]])
            found.update({f"{m} {entry.key}": slot.state[m].clone() for m in MOMENTS if m in slot.state})
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
    _lay_out(config, num_virtual_stages(shape, config.parallel))
    data = build_data(
        config,
        build_tokenizer(config.data, None),
        data_parallel_rank=parallel_state.get_data_parallel_rank(),
        data_parallel_size=parallel_state.get_data_parallel_world_size(),
    )
    state = build_state(config, shape, data.train_iters)
    if disturbed:
        torch.rand(100), random.random(), np.random.rand()
    return Run(state, data)


def differences(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> list[str]:
    """Names of what is not bit for bit the same."""
    names = sorted(left.keys() | right.keys())
    return [name for name in names if not (name in left and name in right and torch.equal(left[name], right[name]))]


def resume_differences(files: Files, name: str, settings: Settings) -> list[str]:
    """What differs at the end between a run that saves after two steps and goes on, and one that resumes there."""
    folder = str(Path(files.work, name.replace(" ", "-")))
    whole = start(configure(files, merged(settings, {"checkpoint": {"save": folder}})))
    whole.train(STEPS_BEFORE_SAVE)
    save_checkpoint(whole.state)
    losses = whole.train(NUM_STEPS - STEPS_BEFORE_SAVE)
    ended = whole.snapshot()
    second = start(configure(files, merged(settings, {"checkpoint": {"load": folder}})), disturbed=True)
    assert load_checkpoint(second.state)
    resumed_losses = second.train(NUM_STEPS - STEPS_BEFORE_SAVE)
    unequal = [] if resumed_losses == losses else [f"losses {losses} {resumed_losses}"]
    if second.state.position != whole.state.position:
        unequal.append("position")
    return unequal + differences(ended, second.snapshot())


def save_differences(files: Files, settings: Settings) -> list[str]:
    """What a save in between, at once or in the background, changes in a run."""
    ends = []
    for name, saves in {"at once": save_checkpoint, "behind": _save_behind, "never": None}.items():
        folder = str(Path(files.work, f"saves-{name.replace(' ', '-')}"))
        run = start(configure(files, merged(settings, {"checkpoint": {"save": folder}})))
        run.train(1)
        if saves is not None:
            saves(run.state)
        ends.append((run.train(1), run.snapshot()))
    *saved, (losses, never) = ends
    return [name for other, end in saved for name in [*differences(end, never), *["losses"] * (other != losses)]]


def _save_behind(state: TrainingState) -> None:
    draft_checkpoint(state, snapshot=True).complete()


def stored_tensors(folder: str | Path) -> dict[str, torch.Tensor]:
    """All whole tensors of a --save folder's only checkpoint, generators aside."""
    stored = open_distributed(next(Path(folder).glob("iter_*")))
    tensors = {
        key: torch.empty(one.shape, dtype=one.dtype) for key, one in stored.items() if not key.startswith("rng.")
    }
    for key, tensor in tensors.items():
        stored[key].fill(tensor, (0,) * tensor.dim())
    return {key: torch.atleast_1d(tensor) for key, tensor in tensors.items()}


def attempt(action: Callable[[], Any]) -> str:
    """The message of the ConfigurationError that it raises, or nothing."""
    try:
        action()
    except ConfigurationError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, while no rank writes."""
    dist.barrier()
    found = {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    dist.barrier()
    return found


def write_on_first_rank(path: Path, content: bytes) -> None:
    """Seen by all ranks when it returns."""
    dist.barrier()
    if dist.get_rank() == 0:
        path.write_bytes(content)
    dist.barrier()
