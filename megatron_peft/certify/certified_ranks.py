"""What the ranks of a certificate's small runs do: train, save, resume, and report all that can be compared.

Whole tensors are gathered through checkpoints: parameters at the start and at the end, and gradients of the first two
steps, written under the keys of the parameters.
"""

import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch import Tensor, nn

from megatron_peft.adapters.step import adapters_step
from megatron_peft.checkpoint.folders import iteration_folder
from megatron_peft.checkpoint.load import load_checkpoint
from megatron_peft.checkpoint.save import Saver, write_new_folder
from megatron_peft.checkpoint.state import (
    MOMENTS,
    optimizer_params,
    optimizer_tensors,
    random_tensors,
    whole_parameters,
)
from megatron_peft.checkpoint.tensors import (
    Sharded,
    data_of,
    global_slices,
    load_parameters,
    master_key,
    sharded_parameters,
    with_data,
)
from megatron_peft.config import CheckpointConfig, RunConfig
from megatron_peft.conversion.verify import BATCH_SIZE
from megatron_peft.data.batches import Microbatch, Step
from megatron_peft.data.build import Data, build_data
from megatron_peft.data.tokenizers import build_tokenizer
from megatron_peft.models.shape import ModelShape
from megatron_peft.runtime.launch import gather_over_world, start_model_parallel, start_world, stop
from megatron_peft.training.after_step import mixtures
from megatron_peft.training.lora_ga_start import first_steps
from megatron_peft.training.run import build_state
from megatron_peft.training.state import GradientShards, TrainingState
from megatron_peft.training.step import train_step
from megatron_peft.training.validation import inference_mode, validation_loss

SAVED_AT = 2  # the step after which a run is resumed and resharded
START, END, GRADIENTS, RESHARDED = "start", "end", "gradients{}", "resharded"
STEPS_WITH_GRADIENTS = (1, 2)  # a LoRA's A has none before its B has moved

Place = tuple[tuple[int, ...], tuple[int, ...]]  # first index and sides of a slice of a global tensor


@dataclass(frozen=True)
class Job:
    """A small run.

    Args:
        config: its flags; checkpoints and tensors are written to the folder of --save.
        shape: of its model.
        tokens: [2, s], on which the trained model is asked for logits.
    """

    config: RunConfig
    shape: ModelShape
    tokens: Tensor

    @property
    def folder(self) -> Path:
        """Where tensors stand, beside the checkpoints."""
        return Path(f"{self.config.checkpoint.save}.tensors")


@dataclass(frozen=True)
class RankReport:
    """What one rank has to say of a run.

    Args:
        place: tensor-parallel rank, stage and replica.
        samples: of the microbatches that this rank read, step by step: digests of their samples.
        losses, grad_norms, layer_grad_norms, num_tokens: of the steps.
        lambdas: of the Hybrid's layers, after the last step.
        slices: digests of what this rank holds of trained tensors, by key and place, at the start and at the end.
        logits: [2, s, vocabulary] before and after training, on a rank that has them.
        not_resumed: names of what differs after resuming from step SAVED_AT; None: it was not tried.
    """

    place: tuple[int, int, int]
    samples: list[list[tuple[str, ...]]]
    losses: list[float]
    grad_norms: list[float]
    layer_grad_norms: list[tuple[float, ...]]
    num_tokens: list[int]
    validation_loss: float
    lambdas: Mapping[str, float]
    slices: Mapping[str, Mapping[tuple[str, Place], str]]
    logits: tuple[Tensor, Tensor] | None
    not_resumed: list[str] | None = None


def train_split(job: Job) -> RankReport:
    """Train in the layout of the configuration, then resume from the middle. Called on every rank."""
    with _world(job):
        found, end = _train(job)
        return replace(found, not_resumed=_resume(job, end))


@dataclass(frozen=True)
class Resharded:
    """Losses of the last steps, of a run that one process resumed from the layout's checkpoint."""

    losses: list[float]


def train_alone(jobs: tuple[Job, Job]) -> tuple[RankReport, Resharded]:
    """Train in one process; then resume, in one process, what the layout saved. Called on one rank.

    Args:
        jobs: the run in one process, and that in its layout.
    """
    alone, split = jobs
    with _world(alone):
        found, _ = _train(alone, split.folder / START if begins_alike(alone.config) else None)
        run = _Run.started(alone, load=iteration_folder(Path(str(split.config.checkpoint.save)), SAVED_AT))
        losses = [run.step().loss for _ in range(run.data.train_iters - SAVED_AT)]
        run.write(RESHARDED)
        return found, Resharded(losses)


def begins_alike(config: RunConfig) -> bool:
    """Whether one process trains from the start that the layout's run has found, once the two were compared.

    LoRA-GA's directions whose singular values are close are exchanged by bfloat16's rounding alone, and with other
    directions all that follows is another run.
    """
    return config.model.bf16 and config.peft.spec.starts_from_gradients


@contextmanager
def _world(job: Job) -> Iterator[None]:
    parallel = job.config.parallel
    start_world("gloo", parallel.distributed_timeout_minutes)
    try:
        start_model_parallel(parallel, job.config.training.seed, parallel.num_virtual_stages(job.shape.num_layers))
        yield
    finally:
        stop()


def _train(job: Job, start: Path | None = None) -> tuple[RankReport, Mapping[str, Tensor]]:
    """What there is to report of a whole run, and its last state on this rank.

    Args:
        start: tensors to begin with, after the run's own were written.
    """
    run = _Run.started(job)
    run.write(START)
    if start is not None:
        load_parameters(run.entries, start)
        run.state.optimizer.reload_model_params()
    slices, before = {START: run.slices()}, run.logits()
    reports = []
    with Saver(job.config.checkpoint) as saver:
        for number in range(1, run.data.train_iters + 1):
            reports.append(run.step(keeps_gradients=number in STEPS_WITH_GRADIENTS))
            if number in (SAVED_AT, run.data.train_iters):
                saver.start(run.state)
                saver.finish()
    run.write(END)
    slices[END], after, mixed = run.slices(), run.logits(), mixtures(run.state)
    end, valid = run.snapshot(), run.data.valid
    report = RankReport(
        place=run.place,
        samples=run.samples,
        losses=[report.loss for report in reports],
        grad_norms=[report.grad_norm for report in reports],
        layer_grad_norms=[report.layer_grad_norms for report in reports],
        num_tokens=[report.num_tokens for report in reports],
        validation_loss=validation_loss(run.state.model_chunks, valid) if valid else 0.0,
        lambdas=mixed.by_layer if mixed else {},
        slices=slices,
        logits=None if before is None or after is None else (before, after),
    )
    return report, end


def _resume(job: Job, end: Mapping[str, Tensor]) -> list[str]:
    """Names of what is not bit for bit that of the run which was not interrupted, whose last state is `end`."""
    run = _Run.started(job, load=iteration_folder(Path(str(job.config.checkpoint.save)), SAVED_AT))
    while run.state.position.iteration < run.data.train_iters:
        run.step()
    again = run.snapshot()
    nothing = torch.empty(0)
    differing = [name for name in {**end, **again} if not torch.equal(end.get(name, nothing), again.get(name, nothing))]
    return sorted({name for names in gather_over_world(differing) for name in names})


@dataclass
class _Run:
    """A run on this rank."""

    job: Job
    state: TrainingState
    data: Data
    steps: Iterator[Step]
    samples: list[list[tuple[str, ...]]]

    @classmethod
    def started(cls, job: Job, load: Path | None = None) -> "_Run":
        """A fresh run, as new processes build it; or resumed from a checkpoint."""
        config = job.config
        if load is not None:
            config = replace(config, checkpoint=CheckpointConfig(load=str(load)))
        data = build_data(
            config,
            build_tokenizer(config.data, None),
            data_parallel_rank=parallel_state.get_data_parallel_rank(),
            data_parallel_size=parallel_state.get_data_parallel_world_size(),
            num_ids=job.shape.vocab_size,
        )
        state = build_state(config, job.shape, data.train_iters, first_steps(config, data.train))
        state.data_digest = data.digest
        load_checkpoint(state)
        data.train.consumed_samples = state.position.consumed_samples
        return cls(job, state, data, iter(data.train), [])

    @property
    def place(self) -> tuple[int, int, int]:
        mpu = parallel_state
        stage = mpu.get_pipeline_model_parallel_rank()
        return mpu.get_tensor_model_parallel_rank(), stage, mpu.get_data_parallel_rank()

    @property
    def entries(self) -> list[Sharded]:
        chunks = [chunk.module for chunk in self.state.model_chunks]
        return sharded_parameters(chunks, only_adapters=self.state.config.peft.trains_adapters)

    def step(self, keeps_gradients: bool = False) -> Any:
        """The next step's report."""
        position, size = self.state.position, self.state.config.global_batch_size
        microbatches = next(self.steps)
        self.samples.append([tuple(_samples(microbatch)) for microbatch in microbatches])
        with self._kept_gradients(position.iteration + 1) if keeps_gradients else _nothing():
            report = train_step(self.state, microbatches, by_layer=True)
        position.iteration += 1
        position.consumed_samples += size
        position.consumed_tokens += report.num_positions
        # As if each step were validated, and the first one were the best: a resumed run has to know it.
        self.state.best = self.state.best.after(float(position.iteration), position.iteration)
        with get_cuda_rng_tracker().fork():  # pyright: ignore[reportOptionalMemberAccess]
            torch.rand(())  # as dropout would, so that a resumed run has to find its generators where they were
        for draw in (random.random, np.random.random_sample, lambda: torch.rand(())):
            draw()
        return report

    @contextmanager
    def _kept_gradients(self, number: int) -> Iterator[None]:
        """Write the gradients of the step as they reach the optimizer: summed, and not clipped."""
        optimizer: Any = self.state.optimizer
        update = optimizer.step

        def write_and_update(*args: Any, **kwargs: Any) -> Any:
            trained = [p for chunk in self.state.model_chunks for p in chunk.parameters() if p.requires_grad]
            gradients = dict(zip(map(id, trained), GradientShards(optimizer).whole(trained), strict=True))
            of_trained = [entry for entry in self.entries if id(entry.data) in gradients]
            self._write(GRADIENTS.format(number), [with_data(one, gradients[id(one.data)]) for one in of_trained])
            return update(*args, **kwargs)

        optimizer.step = write_and_update
        try:
            yield
        finally:
            optimizer.step = update

    def write(self, name: str) -> None:
        """What is trained, whole, and the optimizer's float32 copies of it, into a folder beside the checkpoints."""
        entries, prefix = self.entries, master_key("")
        copies = [one for one in optimizer_tensors(self.state.optimizer, entries) if one.key.startswith(prefix)]
        with whole_parameters(self.state.model_chunks):
            self._write(name, entries, copies)

    def _write(self, name: str, entries: Sequence[Sharded], others: Sequence[ShardedTensor] = ()) -> None:
        slices = [part for entry in entries for part in global_slices(entry)]
        write_new_folder([*slices, *others], self.job.folder / name)

    def slices(self) -> dict[tuple[str, Place], str]:
        """Digests of this rank's slices."""
        with whole_parameters(self.state.model_chunks):
            return {
                (part.key, (tuple(part.global_offset), tuple(part.local_shape))): _digest(data_of(part))
                for entry in self.entries
                for part in global_slices(entry)
            }

    def snapshot(self) -> dict[str, Tensor]:
        """Copies of everything that training changes on this rank."""
        entries = self.entries
        with whole_parameters(self.state.model_chunks):
            found = {entry.key: data_of(entry).detach().clone() for entry in entries}
        for param, entry in optimizer_params(self.state.optimizer, entries):
            found[f"master {entry.key}"] = param.master.detach().clone()
            found |= {f"{name} {entry.key}": param.state[name].clone() for name in MOMENTS if name in param.state}
        found |= {f"generator {one.key.split('.', 2)[2]}": data_of(one).clone() for one in random_tensors()}
        best = {f"lowest validation loss: {name}": number for name, number in vars(self.state.best).items()}
        numbers = {**vars(self.state.position), **best, "schedule": self.state.schedule.num_steps}
        return found | {name: torch.tensor(number) for name, number in numbers.items()}

    @torch.no_grad()
    def logits(self) -> Tensor | None:
        """[2, s, vocabulary] on the first tensor-parallel rank of the last stage of the first replica, else None."""
        chunks, tokens = self.state.model_chunks, self.job.tokens
        num_microbatches = self.state.config.parallel.pipeline_model_parallel_size
        with inference_mode(chunks), adapters_step(chunks, is_training=False):
            found = get_forward_backward_func()(
                forward_step_func=_ask,
                data_iterator=[iter([tokens] * num_microbatches) for _ in chunks]
                if len(chunks) > 1
                else iter([tokens] * num_microbatches),
                model=list(chunks),
                num_microbatches=num_microbatches,
                seq_length=tokens.shape[1],
                micro_batch_size=BATCH_SIZE,
                forward_only=True,
                collect_non_loss_data=True,
            )
        if not found:
            return None
        group: Any = parallel_state.get_tensor_model_parallel_group()
        parts = [torch.empty_like(found[0]) for _ in range(group.size())]
        dist.all_gather(parts, found[0].contiguous(), group=group)
        whole = torch.cat(parts, -1)[..., : self.job.shape.vocab_size].float()
        return whole if self.place[0] == self.place[2] == 0 else None


def _ask(batches: Iterator[Tensor], model: nn.Module) -> tuple[Tensor, Any]:
    tokens = next(batches)
    positions = torch.arange(tokens.shape[1]).expand(tokens.shape)
    logits = model(input_ids=tokens, position_ids=positions, attention_mask=None)
    return logits, lambda output, non_loss_data=True: output


def _samples(microbatch: Microbatch) -> Iterator[str]:
    """Digests of the samples of a microbatch, without padding."""
    rows = zip(microbatch.tokens, microbatch.labels, microbatch.loss_mask, strict=True)
    for tokens, labels, mask in rows:
        lengths = list(microbatch.lengths or [len(tokens)])
        for one in zip(tokens.split(lengths), labels.split(lengths), mask.split(lengths), strict=True):
            counted = one[2].nonzero()
            if len(counted):
                end = int(counted[-1]) + 1
                yield _digest(torch.stack([one[0][:end], one[1][:end]]))


def _digest(tensor: Tensor) -> str:
    flat = tensor.detach().contiguous().view(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy().tobytes()).hexdigest()


@contextmanager
def _nothing() -> Iterator[None]:
    yield
