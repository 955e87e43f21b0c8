"""A run on ranks, and what each of them reports: all that comparisons of layouts need.

A certificate starts small runs of a user's own with it, the tests of layouts start theirs. What is compared is the
product's own code: the loader, `build_state`, `train_step`, `Saver`.
"""

import hashlib
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region, get_cuda_rng_tracker
from torch import Tensor, nn

from megatron_peft.adapters.step import adapters_step
from megatron_peft.checkpoint.folders import iteration_folder
from megatron_peft.checkpoint.load import load_checkpoint
from megatron_peft.checkpoint.save import Saver
from megatron_peft.checkpoint.state import optimizer_tensors, random_states, whole_parameters
from megatron_peft.checkpoint.tensors import Sharded, data_of, global_slices, with_data
from megatron_peft.config import CheckpointConfig, RunConfig
from megatron_peft.data.batches import Microbatch
from megatron_peft.data.tokenizers import build_tokenizer
from megatron_peft.models.shape import ModelShape
from megatron_peft.runtime.launch import model_parallel, world
from megatron_peft.training.run import build_state, data_of_rank, first_steps
from megatron_peft.training.step import StepReport, inference_mode, run_schedule, train_step, validation_loss
from megatron_peft.training.update import GradientShards, mixtures

START, END = "start", "end"
GRADIENTS = {1: "gradients of step 1", 2: "gradients of step 2"}  # a LoRA's A has none before its B has moved
SAVED_AT = 2  # the step after which a run is resumed and resharded

Place = tuple[tuple[int, ...], tuple[int, ...]]  # first index and sides of a slice of a global tensor
Slices = Mapping[tuple[str, Place], Tensor]  # what a rank holds of global tensors, by their keys


@dataclass(frozen=True)
class Job:
    """A run to be trained from its start or from --load; with --save it saves after SAVED_AT and at the end."""

    config: RunConfig
    shape: ModelShape
    tokens: Tensor | None = None  # [2, s], on which the model is asked for logits before and after training
    start: Mapping[str, Tensor] | None = None  # whole tensors to begin with, after the run's own start was reported

    def resumed(self, saved: RunConfig) -> "Job":
        """The rest of this run, from what the run `saved` has saved after step SAVED_AT."""
        folder = iteration_folder(Path(str(saved.checkpoint.save)), SAVED_AT)
        return Job(replace(self.config, checkpoint=CheckpointConfig(load=str(folder))), self.shape)


@dataclass(frozen=True)
class Curve:
    """Numbers of a run that every rank knows."""

    steps: list[StepReport]  # with the gradient norms of layers
    lambdas: Mapping[str, float]  # of the Hybrid's layers, after the last step
    validation_loss: float  # after the last step; 0 without validation data

    @property
    def losses(self) -> list[float]:
        return [step.loss for step in self.steps]


@dataclass(frozen=True)
class RankReport:
    """What one rank has to say of a run."""

    config: RunConfig
    place: tuple[int, int, int]  # tensor-parallel rank, stage and replica
    curve: Curve
    # What this rank holds: at START and END of trained tensors and of the optimizer's, and GRADIENTS of the parameters
    # as they reach the optimizer, summed and not clipped.
    tensors: Mapping[str, Slices]
    samples: list[list[tuple[str, ...]]]  # digests of what was in this rank's microbatches, step by step
    logits: tuple[Tensor, Tensor] | None  # [2, s, vocabulary] before and after training, on a rank that has them
    others: Mapping[str, Any]  # what a resumed run has to find beside tensors, at the end


def run_jobs(jobs: Sequence[Job]) -> list[RankReport]:
    """Train one after the other in a world of this rank's. Called on every rank."""
    with world("gloo", jobs[0].config.parallel.distributed_timeout_minutes):
        return [run_job(job) for job in jobs]


def run_job(job: Job) -> RankReport:
    """Train in the present world."""
    parallel = job.config.parallel
    with model_parallel(parallel, job.config.training.seed, parallel.num_virtual_stages(job.shape.num_layers)):
        run = Run(job.config, job.shape)
        tensors, steps, samples = {START: run.tensors()}, [], []
        if job.start is not None:
            run.begin_with(job.start)
        before = run.logits(job.tokens)
        optimizer: Any = run.state.optimizer
        update, position, last = optimizer.step, run.state.position, run.data.train_iters

        def keep_gradients_and_update(*args: Any, **kwargs: Any) -> Any:
            if name := GRADIENTS.get(position.iteration + 1):
                tensors[name] = run.gradients()
            return update(*args, **kwargs)

        optimizer.step = keep_gradients_and_update
        batches = iter(run.data.train)
        with Saver(job.config.checkpoint) as saver:
            while position.iteration < last:
                microbatches = next(batches)
                samples.append([tuple(_samples(microbatch)) for microbatch in microbatches])
                steps.append(run.step(microbatches))
                if job.config.checkpoint.save and position.iteration in (SAVED_AT, last):
                    saver.start(run.state)
                    saver.finish()
        tensors[END] = run.tensors()
        after, mixed, others = run.logits(job.tokens), mixtures(run.state), run.others()
        loss = validation_loss(run.state.model_chunks, run.data.valid) if run.data.valid else 0.0
    curve = Curve(steps, mixed.by_layer if mixed else {}, loss)
    logits = None if before is None or after is None else (before, after)
    return RankReport(job.config, run.place, curve, tensors, samples, logits, others)


class Run:
    """A run on this rank, as new processes build it in the present groups, or resume it with --load."""

    def __init__(self, config: RunConfig, shape: ModelShape) -> None:
        self.data = data_of_rank(config, build_tokenizer(config.data, None), shape)
        self.state = build_state(config, shape, self.data.train_iters, first_steps(config, self.data.train))
        self.state.data_digest = self.data.digest
        load_checkpoint(self.state)
        self.data.train.consumed_samples = self.state.position.consumed_samples
        self.place = (
            parallel_state.get_tensor_model_parallel_rank(),
            parallel_state.get_pipeline_model_parallel_rank(),
            parallel_state.get_data_parallel_rank(),
        )

    def step(self, microbatches: Sequence[Microbatch]) -> StepReport:
        """Train, as if the last rank were asked to stop after the second step: all have to hear of it."""
        state, position = self.state, self.state.position
        asked_to_stop = dist.get_rank() == dist.get_world_size() - 1 and position.iteration == 1
        report = train_step(state, microbatches, lambda: asked_to_stop, by_layer=True)
        state.advance(report.num_positions)
        # As if each step were validated, and the first one were the best: a resumed run has to know it.
        state.best = state.best.after(float(position.iteration), position.iteration)
        with get_cuda_rng_tracker().fork():  # pyright: ignore[reportOptionalMemberAccess]
            torch.rand(())  # as dropout would, so that a resumed run has to find its generators where they were
        for draw in (random.random, np.random.random_sample, lambda: torch.rand(())):
            draw()
        return report

    # What is reported of it.

    def tensors(self) -> Slices:
        """What this rank would save of trained tensors and of the optimizer's."""
        with whole_parameters(self.state.model_chunks):
            entries = self.state.entries
            return _copies([*entries, *optimizer_tensors(self.state.optimizer, entries)])

    def gradients(self) -> Slices:
        """Each parameter's, by its key. A collective."""
        trained = [p for chunk in self.state.model_chunks for p in chunk.parameters() if p.requires_grad]
        whole = dict(zip(map(id, trained), GradientShards(self.state.optimizer).whole(trained), strict=True))
        entries = (tensor for tensor in self.state.entries if id(tensor.data) in whole)
        return _copies(with_data(tensor, whole[id(tensor.data)]) for tensor in entries)

    def others(self) -> dict[str, Any]:
        """What else training changes on this rank."""
        state = self.state
        generators = {f"generator {name}": held.numpy().tobytes() for name, held in random_states().items()}
        best = {f"lowest validation loss: {name}": number for name, number in vars(state.best).items()}
        return {**generators, **vars(state.position), **best, "schedule": state.schedule.num_steps}

    def begin_with(self, start: Mapping[str, Tensor]) -> None:
        """Take these whole tensors for the trained ones."""
        with torch.no_grad():
            for part in (part for entry in self.state.entries for part in global_slices(entry)):
                data_of(part).copy_(start[part.key][slice_of(part.global_offset, part.local_shape)])
        self.state.optimizer.reload_model_params()

    @torch.no_grad()
    def logits(self, tokens: Tensor | None) -> Tensor | None:
        """[2, s, vocabulary] on the first tensor-parallel rank of the last stage of the first replica, else None."""
        if tokens is None:
            return None
        chunks, count = self.state.model_chunks, self.state.config.parallel.pipeline_model_parallel_size
        positions = torch.arange(tokens.shape[1]).expand(tokens.shape)
        batch = Microbatch(tokens, tokens, torch.ones(tokens.shape), positions, len(tokens))
        with inference_mode(chunks), adapters_step(chunks, is_training=False):
            logits = run_schedule(chunks, [batch] * count, forward_only=True, forward=_logits)
        is_asked = len(logits) and self.place[0] == self.place[2] == 0
        return logits[0][..., : self.state.shape.vocab_size].float() if is_asked else None


def _logits(microbatches: Iterator[Microbatch], model: nn.Module) -> tuple[Tensor, Any]:
    """Stands for a step's forward: the schedule collects logits in the place of each microbatch's report."""
    batch = next(microbatches)
    logits = model(input_ids=batch.tokens, position_ids=batch.position_ids, attention_mask=None)
    return logits, lambda output: (output.sum(), torch.tensor(1), gather_from_tensor_model_parallel_region(output))


def _copies(entries: Iterable[Sharded]) -> Slices:
    parts = (part for entry in entries for part in global_slices(entry))
    return {
        (part.key, (tuple(part.global_offset), tuple(part.local_shape))): data_of(part).detach().clone()
        for part in parts
    }


def slice_of(offset: Sequence[int], sides: Sequence[int]) -> tuple[slice, ...]:
    """The index of a slice in its global tensor."""
    return tuple(slice(start, start + side) for start, side in zip(offset, sides, strict=True))


def _samples(microbatch: Microbatch) -> Iterator[str]:
    """Digests of the samples of a microbatch, without padding."""
    for row in zip(microbatch.tokens, microbatch.labels, microbatch.loss_mask, strict=True):
        lengths = list(microbatch.lengths or [len(row[0])])
        for tokens, labels, mask in zip(*(values.split(lengths) for values in row), strict=True):
            if len(counted := mask.nonzero()):
                end = int(counted[-1]) + 1
                yield hashlib.sha256(torch.stack([tokens[:end], labels[:end]]).numpy().tobytes()).hexdigest()
