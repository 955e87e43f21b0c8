"""One rank's step in any layout, put together from recorded segments of the model (`rehearsal/layer_recording.py`).

A rehearsal runs the whole step of one layout; --fit looks at hundreds, whose stages consist of the same layers. What a
pipeline adds is here and in `pipeline.py`: which segments a stage holds, the messages that its chunks keep, the order
in which microbatches come and go. Gradients and the optimizer's moments follow from numbers of parameters.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

from megatron_peft.config import RunConfig
from megatron_peft.models.kernels import Training, messages
from megatron_peft.models.shape import ModelShape
from megatron_peft.rehearsal.program import (
    ENDS,
    ITEM_BYTES,
    Call,
    Computation,
    Entry,
    Memory,
    Parameters,
    RecordedLayers,
    RecordedPass,
    Segment,
)
from megatron_peft.rehearsal.requests import Chunk, chunks_of_stages, enough_microbatches, targets_of_layers
from megatron_peft.rehearsal.schedule import RankGrid

Pass = Literal["forward", "backward"]


@dataclass(frozen=True)
class Turn:
    """A chunk's forward or backward of one microbatch."""

    phase: Pass
    microbatch: int
    chunk: int


@lru_cache(maxsize=1000)
def turns(stage: int, num_stages: int, num_chunks: int, num_microbatches: int) -> list[Turn]:
    """What a pipeline rank does, in the order of megatron-core's schedules: plain, 1F1B or interleaved."""
    total = num_microbatches * num_chunks
    # Microbatches go through the chunks in groups of as many as there are stages.
    group = num_stages if num_chunks > 1 else 1
    order = [
        (first + within, chunk)
        for first in range(0, num_microbatches, group)
        for chunk in range(num_chunks)
        for within in range(group)
    ]
    forwards = [Turn("forward", microbatch, chunk) for microbatch, chunk in order]
    backwards = [Turn("backward", microbatch, num_chunks - 1 - chunk) for microbatch, chunk in order]
    if num_chunks == 1:
        warmup = min(num_stages - stage - 1, total)
    elif num_microbatches == num_stages:
        warmup = total
    else:
        warmup = min((num_stages - stage - 1) * 2 + (num_chunks - 1) * num_stages, total)
    steady = [turn for pair in zip(forwards[warmup:], backwards, strict=False) for turn in pair]
    return [*forwards[:warmup], *steady, *backwards[total - warmup :]]


class RecordedStep:
    """A rank's step in a run: the rank that is first of its tensor- and data-parallel groups, of any stage.

    Args:
        run: with its world size.
        shape: of the base model.
        layers: as they were recorded for `LayersToRecord.of(run, shape)`.
    """

    def __init__(self, run: RunConfig, shape: ModelShape, layers: RecordedLayers) -> None:
        self.run, self.shape, self.layers = run, shape, layers
        parallel = run.parallel
        self.grid = RankGrid.of(parallel)
        self.t, self.dp, self.pp = self.grid.tensor, self.grid.data, self.grid.pipeline
        self.dtype = "bfloat16" if run.model.bf16 else "float32"
        self.item = ITEM_BYTES[self.dtype]
        tokens = run.data.seq_length * run.training.micro_batch_size
        own = tokens // self.t if parallel.sequence_parallel else tokens  # tokens of a rank between linear layers
        self.message, self.message_bytes = (own, shape.hidden_size), own * shape.hidden_size * self.item
        self.chunks = chunks_of_stages(parallel, shape.num_layers)
        self.is_full = not run.peft.trains_adapters
        self._targets = targets_of_layers(run, shape)
        self._trained = {name: one.num_trained * (name not in ENDS) for name, one in layers.parameters.items()}
        how = messages(run.model.transformer, parallel, Training.of(run))
        self.tells_sizes, self._frees_outputs = how["variable_seq_lengths"], how["deallocate_pipeline_outputs"]

    def rank(self, stage: int) -> int:
        """The global rank of the first one of its tensor- and data-parallel groups."""
        return self.grid.rank(0, 0, stage)

    def tensor_group(self, stage: int) -> tuple[int, ...]:
        """Its tensor-parallel ranks."""
        return self.grid.ranks(range(self.t), [0], [stage])

    def data_group(self, stage: int) -> tuple[int, ...]:
        """Its replicas."""
        return self.grid.ranks([0], range(self.dp), [stage])

    def segments(self, chunk: Chunk) -> tuple[Segment, ...]:
        """What a chunk consists of, in the order of its forward."""
        layers: list[Segment] = [self._targets[layer] for layer in chunk.layers]
        first = next((index for index, targets in enumerate(layers) if targets), None)
        if chunk.embedding and first is not None:  # backward need not go beyond the first adapter
            layers[: first + 1] = [*["before"] * first, "first"]
        return (*["embedding"] * chunk.embedding, *layers, *["head"] * chunk.head)

    def stages_that_differ(self) -> list[int]:
        """One stage of each content: the first, which has most microbatches in flight."""
        contents = [tuple(map(self.segments, chunks)) for chunks in self.chunks]
        return [stage for stage, held in enumerate(contents) if contents.index(held) == stage]

    def passes_of(self, phase: Pass, segments: Sequence[Segment]) -> list[RecordedPass]:
        """A microbatch's passes in program order; what a segment does not do is missing."""
        found = [self.layers.passes.get((phase, segment), RecordedPass()) for segment in segments]
        return found if phase == "forward" else found[::-1]

    def entries(self, phase: Pass, segments: Sequence[Segment], stage: int) -> tuple[Entry, ...]:
        """A pass of one microbatch through these segments, with the calls of the tensor-parallel ranks."""
        group = self.tensor_group(stage)
        found = (entry for one in self.passes_of(phase, segments) for entry in one.entries)
        return tuple(replace(entry, group=group) if isinstance(entry, Call) else entry for entry in found)

    def parameters(self, chunks: Sequence[Chunk]) -> Parameters:
        """Those of chunks of one rank."""
        return Parameters.sum(self.layers.parameters[segment] for chunk in chunks for segment in self.segments(chunk))

    def _share(self, stage: int) -> float:
        """What is trained in the stage's layers, of that in the recorded ones; 1: they are as many as were recorded."""
        own = sum(self._trained[segment] for chunk in self.chunks[stage] for segment in self.segments(chunk))
        return own / max(sum(self._trained.values()), 1)

    def built_once(self, stage: int, phase: Literal["begin", "finish"]) -> list[Entry]:
        """What is built for a stage's layers before the first microbatch; what is done with it after the last.

        As it was recorded for several layers, but of a share of them (`_share`), and with one tensor a call.
        """
        share, fixed, group = self._share(stage), self.layers.fixed_kernels[phase], self.tensor_group(stage)
        found: list[Entry] = []
        for entry in self.layers.passes[phase, ""].entries if share else ():
            if isinstance(entry, Computation):
                scaled = {replace(one, batch=max(round(one.batch * share), 1)): n for one, n in entry.products.items()}
                num_kernels = round(entry.num_kernels * (fixed + (1 - fixed) * share))
                entry = Computation(scaled, round(entry.num_bytes * share), num_kernels)
            elif isinstance(entry, Call):
                size = round(share * entry.num_bytes / ITEM_BYTES[entry.dtype])
                entry = replace(entry, group=group, shapes=((size,),))
            found.append(entry)
        return found

    # Memory, in parts.

    def held(self, stage: int) -> Memory:
        """Bytes that are there all the time."""
        counts, optimizer = self.parameters(self.chunks[stage]), self.run.optimizer
        shards = self.dp if optimizer.use_distributed_optimizer else 1
        moments = {"adam": 8, "sgd": 4 if optimizer.sgd_momentum else 0}[optimizer.optimizer]
        masters = 0 if self.item == ITEM_BYTES["float32"] else 4 * counts.trained
        return {
            "weights": counts.weight_bytes,
            "gradients": self.gradient_bytes * counts.num_trained,
            "optimizer": (masters + moments * counts.num_trained) // shards,
            "buffers": counts.buffer_bytes + self.layers.cached * any(chunk.layers for chunk in self.chunks[stage]),
        }

    @property
    def gradient_bytes(self) -> int:
        """Bytes of an element."""
        return 2 if self.run.training.grad_reduce_in_bf16 and self.item == 2 else 4

    def passes(self, stage: int) -> dict[tuple[Pass, int], tuple[int, int]]:
        """Phase, chunk -> bytes that a pass of a microbatch leaves, and their peak; both relative to its begin."""
        found: dict[tuple[Pass, int], tuple[int, int]] = {}
        for number, chunk in enumerate(self.chunks[stage]):
            for phase in ("forward", "backward"):
                at = top = 0
                for one in self.passes_of(phase, self.segments(chunk)):
                    top, at = max(top, at + one.peak), at + one.left
                receives = self.message_bytes * (not (chunk.embedding if phase == "forward" else chunk.head))
                if phase == "forward":  # the input from another stage is kept
                    at += receives - self.message_bytes * (not chunk.head and self._frees_outputs)
                # The interleaved schedule has asked for the next input too.
                found[phase, number] = at, top + receives + self.message_bytes * (len(self.chunks[stage]) > 1)
            found["backward", number] = -found["forward", number][0], found["backward", number][1]
        return found

    def memory(self, stage: int) -> Memory:
        """Bytes at the highest point of a walk through the schedule's turns, or of the update after them."""
        passes, memory, num_chunks = self.passes(stage), self.held(stage), len(self.chunks[stage])
        num_microbatches = enough_microbatches(self.run, stage, self.run.num_microbatches)
        live = activations = temporary = 0
        for turn in turns(stage, self.pp, num_chunks, num_microbatches):
            left, top = passes[turn.phase, turn.chunk]
            if live + top > activations + temporary:
                activations, temporary = live, top
            live += left
        built = round(self.layers.passes["begin", ""].left * self._share(stage))  # gone before the update
        of_update = self._bytes_of_update(stage)
        if of_update > activations + temporary + built:
            return {**memory, "activations": 0, "temporary": of_update}
        return {**memory, "buffers": memory["buffers"] + built, "activations": activations, "temporary": temporary}

    def _bytes_of_update(self, stage: int) -> int:
        """Tensors of a moment: Adam takes two of a parameter's size; gradients in bf16 are copied to float32."""
        counts, optimizer = self.parameters(self.chunks[stage]), self.run.optimizer
        own, largest = counts.num_trained, counts.largest
        if optimizer.use_distributed_optimizer:  # where sums overlap the backward, each of their buckets is divided
            own //= self.dp
            largest = largest // self.dp if self.run.training.overlap_grad_reduce else min(largest, own)
        of_adam = 2 * 4 * largest if optimizer.optimizer == "adam" else 0
        return of_adam + 4 * own * (self.gradient_bytes == 2)


def total(memory: Memory) -> int:
    """Bytes."""
    return sum(memory.values())
