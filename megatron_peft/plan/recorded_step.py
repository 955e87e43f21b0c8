"""One rank's step in any layout, put together from recorded segments of the model (`rehearsal/rehearsed_rank.py`).

A rehearsal runs the whole step of one layout; --fit looks at hundreds, whose stages consist of the same layers. What a
pipeline adds is here: which segments a stage holds, the messages that its chunks keep, the order in which microbatches
come and go. Gradients and the optimizer's moments follow from numbers of parameters.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache, lru_cache
from itertools import zip_longest
from typing import Any, Literal

from megatron.core.pipeline_parallel.schedules import get_schedule_table

from megatron_peft.config import RunConfig
from megatron_peft.models.kernels import Training, messages
from megatron_peft.models.shape import ModelShape
from megatron_peft.plan.cluster import Cluster
from megatron_peft.plan.timing import StepTime, WorkTime, step_time, time_alone
from megatron_peft.rehearsal import program
from megatron_peft.rehearsal.program import Call, Computation, Entry, Mark, Parameters, RecordedLayers, Wait
from megatron_peft.rehearsal.rehearsal import RankGrid
from megatron_peft.rehearsal.requests import Chunk, chunks_of_stages, enough_microbatches, targets_of_layers

Pass = Literal["forward", "backward"]


@lru_cache(maxsize=1000)
def turns(stage: int, num_stages: int, num_chunks: int, num_microbatches: int) -> list[Mark]:
    """A pipeline rank's passes in the order of megatron-core's schedules: plain, 1F1B or interleaved."""
    total = num_microbatches * num_chunks
    # Microbatches go through the chunks in groups of as many as there are stages.
    order = get_schedule_table(num_microbatches, num_chunks, num_stages if num_chunks > 1 else 1)
    forwards = [Mark("forward", microbatch, chunk) for microbatch, chunk in order]
    backwards = [Mark("backward", microbatch, num_chunks - 1 - chunk) for microbatch, chunk in order]
    if num_chunks == 1:
        warmup = min(num_stages - stage - 1, total)
    else:
        warmup = min((num_stages - stage - 1) * 2 + (num_chunks - 1) * num_stages, total)
    steady = [turn for pair in zip(forwards[warmup:], backwards, strict=False) for turn in pair]
    return [*forwards[:warmup], *steady, *backwards[total - warmup :]]


class RecordedStep:
    """A rank's step in a run: the rank that is first of its tensor- and data-parallel groups, of any stage.

    `layers` are those that were recorded for `LayersToRecord.of(run, shape)`.
    """

    def __init__(self, run: RunConfig, shape: ModelShape, layers: RecordedLayers) -> None:
        self.run, self.shape, self.layers = run, shape, layers
        parallel = run.parallel
        self.grid = RankGrid.of(parallel)
        self.t, self.dp, self.pp = self.grid.tensor, self.grid.data, self.grid.pipeline
        self.dtype = "bfloat16" if run.model.bf16 else "float32"
        self.item = program.ITEM_BYTES[self.dtype]
        tokens = run.data.seq_length * run.training.micro_batch_size
        own = tokens // self.t if parallel.sequence_parallel else tokens  # tokens of a rank between linear layers
        self.message, self.message_bytes = (own, shape.hidden_size), own * shape.hidden_size * self.item
        self.chunks = chunks_of_stages(parallel, shape.num_layers)
        self.is_full = not run.peft.trains_adapters
        self._targets = targets_of_layers(run, shape)
        self._trained = {name: p.num_trained * (name not in program.ENDS) for name, p in layers.parameters.items()}
        how = messages(run.model.transformer, parallel, Training.of(run))
        self.tells_sizes, self._frees_outputs = how["variable_seq_lengths"], how["deallocate_pipeline_outputs"]

    def rank(self, stage: int) -> int:
        return self.grid.rank(0, 0, stage)

    def tensor_group(self, stage: int) -> tuple[int, ...]:
        return self.grid.ranks(range(self.t), [0], [stage])

    def data_group(self, stage: int) -> tuple[int, ...]:
        return self.grid.ranks([0], range(self.dp), [stage])

    def segments(self, chunk: Chunk) -> tuple[program.Segment, ...]:
        """What a chunk consists of, in the order of its forward."""
        layers: list[program.Segment] = [self._targets[layer] for layer in chunk.layers]
        first = next((index for index, targets in enumerate(layers) if targets), None)
        if chunk.embedding and first is not None:  # backward need not go beyond the first adapter
            layers[: first + 1] = [*["before"] * first, "first"]
        return (*["embedding"] * chunk.embedding, *layers, *["head"] * chunk.head)

    def passes_of(self, phase: Pass, segments: Sequence[program.Segment]) -> list[program.RecordedPass]:
        """A microbatch's passes in program order; what a segment does not do is missing."""
        passes = [self.layers.passes.get((phase, segment), program.RecordedPass()) for segment in segments]
        return passes if phase == "forward" else passes[::-1]

    def entries(self, phase: Pass, segments: Sequence[program.Segment], stage: int) -> tuple[Entry, ...]:
        """A pass of one microbatch through these segments, with the calls of the tensor-parallel ranks."""
        group = self.tensor_group(stage)
        entries = (entry for recorded in self.passes_of(phase, segments) for entry in recorded.entries)
        return tuple(replace(entry, group=group) if isinstance(entry, Call) else entry for entry in entries)

    def parameters(self, chunks: Sequence[Chunk]) -> Parameters:
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
        entries: list[Entry] = []
        for entry in self.layers.passes[phase, ""].entries if share else ():
            if isinstance(entry, Computation):
                scaled = {replace(p, batch=max(round(p.batch * share), 1)): n for p, n in entry.products.items()}
                num_kernels = round(entry.num_kernels * (fixed + (1 - fixed) * share))
                entry = Computation(scaled, round(entry.num_bytes * share), num_kernels)
            elif isinstance(entry, Call):
                size = round(share * entry.num_bytes / program.ITEM_BYTES[entry.dtype])
                entry = replace(entry, group=group, shapes=((size,),))
            entries.append(entry)
        return entries

    # Memory, in parts.

    def held(self, stage: int) -> program.Memory:
        """Bytes that are there all the time."""
        counts, optimizer = self.parameters(self.chunks[stage]), self.run.optimizer
        shards = self.dp if optimizer.use_distributed_optimizer else 1
        moments = {"adam": 8, "sgd": 4 if optimizer.sgd_momentum else 0}[optimizer.optimizer]
        masters = 0 if self.item == program.ITEM_BYTES["float32"] else 4 * counts.trained
        return {
            "weights": counts.weight_bytes,
            "gradients": self.gradient_bytes * counts.num_trained,
            "optimizer": (masters + moments * counts.num_trained) // shards,
            "buffers": counts.buffer_bytes + self.layers.cached * any(chunk.layers for chunk in self.chunks[stage]),
        }

    @property
    def gradient_bytes(self) -> int:  # of an element
        return 2 if self.run.training.grad_reduce_in_bf16 and self.item == 2 else 4

    def passes(self, stage: int) -> dict[tuple[str, int], tuple[int, int]]:
        """Phase, chunk -> bytes that a pass of a microbatch leaves, and their peak; both relative to its begin."""
        passes: dict[tuple[str, int], tuple[int, int]] = {}
        for number, chunk in enumerate(self.chunks[stage]):
            for phase in ("forward", "backward"):
                at = top = 0
                for recorded in self.passes_of(phase, self.segments(chunk)):
                    top, at = max(top, at + recorded.peak), at + recorded.left
                receives = self.message_bytes * (not (chunk.embedding if phase == "forward" else chunk.head))
                if phase == "forward":  # the input from another stage is kept
                    at += receives - self.message_bytes * (not chunk.head and self._frees_outputs)
                # The interleaved schedule has asked for the next input too.
                passes[phase, number] = at, top + receives + self.message_bytes * (len(self.chunks[stage]) > 1)
            passes["backward", number] = -passes["forward", number][0], passes["backward", number][1]
        return passes

    def memory(self, stage: int) -> program.Memory:
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


def total(memory: program.Memory) -> int:
    """Bytes of all parts."""
    return sum(memory.values())


# The program of each stage, for a replay of the pipeline: microbatches in the schedule's order, their messages, sums of
# gradients, the update. `rehearsal/rehearsal.py` asks megatron-core's own schedules for the same order, which takes
# longer.


def estimated_time(step: RecordedStep, cluster: Cluster) -> StepTime:
    """The time of a step, by a replay of all its stages; one rank stands for its tensor- and data-parallel peers."""
    cluster = cluster.of_run(step.run)
    return step_time({step.rank(stage): [*_Program(step, stage, cluster)] for stage in range(step.pp)}, cluster)


# Those whose gradients are summed in one call, and their part of a chunk's work, from 0 to 1.
Bucket = tuple[Parameters, float]
_one_call = cache(Call)  # the same object each time: a replay looks at it once


class _Program:
    def __init__(self, step: RecordedStep, stage: int, cluster: Cluster) -> None:
        self.step, self.stage, self.cluster = step, stage, cluster
        self.chunks, self.rank = step.chunks[stage], step.rank(stage)

        @cache  # most chunks are alike
        def time(phase: Pass, segments: Sequence[program.Segment]) -> WorkTime:
            return time_alone(step.entries(phase, segments, stage), self.rank, cluster)

        self.blocks = {
            (phase, number): time(phase, step.segments(chunk))
            for number, chunk in enumerate(self.chunks)
            for phase in ("forward", "backward")
        }
        self.whole = step.parameters(self.chunks)
        self.gathers_early = step.run.optimizer.overlap_param_gather and step.dp > 1
        self.reduces_early = step.run.training.overlap_grad_reduce and step.dp > 1
        self.buckets = [self._buckets(chunk) for chunk in range(len(self.chunks))]
        self.sums: list[str] = []  # handles

    def __iter__(self) -> Iterator[Entry | WorkTime]:
        yield from self.start()
        yield from self.interleaved() if len(self.chunks) > 1 else self.plain()
        yield from self.finish()

    def message(self, operation: str, turn: Mark | None, **posted: Any) -> tuple[Call, ...]:
        """A turn's output ("send") or input ("recv"), if it goes to another stage or comes from one.

        Activations and their gradients go on axes of their own, so that their order does not matter where the next
        stage is also the previous one.
        """
        if turn is None:
            return ()
        step, chunk, is_next = self.step, self.chunks[turn.chunk], (turn.phase == "forward") == (operation == "send")
        if chunk.head if is_next else chunk.embedding:
            return ()
        peer = step.rank((self.stage + (1 if is_next else -1)) % step.pp)
        return (_one_call(operation, f"pipeline {turn.phase}", (), (step.message,), step.dtype, peer, **posted),)

    def compute(self, turn: Mark) -> Iterator[Entry | WorkTime]:
        yield turn
        block, buckets = self.blocks[turn.phase, turn.chunk], self.buckets[turn.chunk]
        last = self.step.run.num_microbatches - 1
        if turn.phase == "forward" and turn.microbatch == 0 and self.gathers_early:
            # Where the layers of a bucket begin, their parameters are waited for, and those of the next one asked for.
            for number, ((bucket, part), following) in enumerate(zip_longest(buckets, buckets[1:])):
                if bucket.num_trained:
                    yield Wait(f"gather {turn.chunk} {number}")
                if following is not None:
                    yield from self._gather_of_parameters(following[0], f"gather {turn.chunk} {number + 1}")
                yield block.share(part)
        elif turn.phase == "backward" and turn.microbatch == last and self.reduces_early:
            for number, (bucket, part) in enumerate(reversed(buckets)):
                yield block.share(part)
                yield from self._sum_of_gradients(bucket, f"sum {turn.chunk} {number}")
        else:
            yield block

    def _buckets(self, chunk: int) -> list[Bucket]:
        """Where sums overlap the backward, megatron-core cuts the first chunk into buckets; it cuts no other."""
        counts, step = self.step.parameters([self.chunks[chunk]]), self.step
        if chunk or not self.reduces_early:
            return [(counts, 1.0)]
        embedding = step.layers.parameters["embedding"].trained * self.chunks[chunk].embedding
        layers = counts.trained - embedding
        number = max(layers // max(40_000_000, 1_000_000 * step.dp), 1)
        cut = Parameters(trained=layers // number, trained_float32=counts.trained_float32 // number)
        cuts = [(cut, 1 / number)] * number if cut.num_trained else []
        first = [(Parameters(trained=embedding), 0.0 if cuts else 1.0)] if embedding else []
        return [*first, *cuts] or [(counts, 1.0)]

    def plain(self) -> Iterator[Entry | WorkTime]:
        """One forward, one backward: a message out is waited for together with the one that comes in."""
        num_microbatches = self.step.run.num_microbatches
        order = turns(self.stage, self.step.pp, 1, num_microbatches)
        alternates = num_microbatches > self.step.pp - 1 - self.stage  # after its first forwards
        yield from self.batch(self.message("recv", order[0], batch=0))
        for turn, following in zip_longest(order, order[1:]):
            yield from self.compute(turn)
            sent, received = self.message("send", turn, batch=0), self.message("recv", following, batch=0)
            if alternates and sent and following and following.phase != turn.phase:
                yield from self.batch(sent + received)
            else:
                yield from self.batch(sent)
                yield from self.batch(received)

    def batch(self, messages: Sequence[Call]) -> Iterator[Call]:
        """Posted together; where lengths vary, their shapes are exchanged first (`models/kernels.messages`)."""
        if self.step.tells_sizes:
            yield from (_one_call(msg.operation, msg.axis, (), ((3,),), "int64", msg.peer, batch=1) for msg in messages)
        yield from messages

    def interleaved(self) -> Iterator[Entry | WorkTime]:
        """Messages run beside the computation: the next turn's input is asked for before this turn."""
        order = turns(self.stage, self.step.pp, len(self.chunks), self.step.run.num_microbatches)
        yield from self.message("recv", order[0], handle="recv 0")
        for number, (turn, following) in enumerate(zip_longest(order, order[1:])):
            yield from self.message("recv", following, handle=f"recv {(number + 1) % 2}")
            if self.message("recv", turn):
                yield Wait(f"recv {number % 2}")
            yield from self.compute(turn)
            yield from self.message("send", turn, handle="send")

    # What a step has once.

    def collective(
        self, operation: str, axis: str, group: Sequence[int], size: int, dtype: str, handle: str | None = None
    ) -> Iterator[Call]:
        if size > 0 and len(group) > 1:
            yield Call(operation, axis, tuple(group), ((size,),), dtype, handle=handle)

    def _sum_of_gradients(self, bucket: Parameters, handle: str | None = None) -> Iterator[Call]:
        step, size = self.step, bucket.num_trained
        operation = "reduce_scatter" if step.run.optimizer.use_distributed_optimizer else "all_reduce"
        dtype = "float32" if step.gradient_bytes == 4 else "bfloat16"
        self.sums += [handle] if handle and size else []
        yield from self.collective(operation, "data", step.data_group(self.stage), size, dtype, handle)

    def _gather_of_parameters(self, bucket: Parameters, handle: str | None = None) -> Iterator[Call]:
        step, group = self.step, self.step.data_group(self.stage)
        shard = -(-bucket.trained // step.dp) + -(-bucket.trained_float32 // step.dp) * 4 // step.item
        yield from self.collective("all_gather", "data", group, shard, step.dtype, handle)

    def start(self) -> Iterator[Entry | WorkTime]:
        """Gradients set to zero, blocks of rotations built, parameters gathered."""
        yield Mark("begin")
        yield Computation(num_bytes=4 * self.whole.num_trained, num_kernels=2)
        yield time_alone(self.step.built_once(self.stage, "begin"), self.rank, self.cluster)
        if self.gathers_early:
            for chunk, buckets in enumerate(self.buckets):
                yield from self._gather_of_parameters(buckets[0][0], f"gather {chunk} 0")

    def finish(self) -> Iterator[Entry | WorkTime]:
        """Sums of gradients, the check, the update."""
        step, whole, group = self.step, self.whole, self.step.data_group(self.stage)
        trained = whole.num_trained
        yield Mark("finish")
        yield time_alone(step.built_once(self.stage, "finish"), self.rank, self.cluster)
        if self.reduces_early:
            yield from map(Wait, self.sums)
        else:
            for [(bucket, _)] in self.buckets:
                yield from self._sum_of_gradients(bucket)
        if step.is_full and step.shape.tied_embeddings and step.pp > 1 and self.stage in (0, step.pp - 1):
            ends, table = (step.rank(0), step.rank(step.pp - 1)), step.layers.parameters["embedding"].trained
            yield from self.collective("all_reduce", "embedding", ends, table, "float32")
        yield from self.collective("broadcast", "pipeline", step.grid.ranks([0], [0], range(step.pp)), 1, "int32")
        yield from self.collective("all_reduce", "data", group, 1, "int32")
        yield Computation(num_bytes=8 * trained, num_kernels=1 + 4 * len(self.chunks))
        yield from self.collective("all_reduce", "tensor", step.tensor_group(self.stage), whole.partial, "float32")
        yield Computation(num_bytes=8 * whole.partial, num_kernels=whole.num_tensors // 2 * (whole.partial > 0))
        world = range(step.t * step.pp * step.dp)
        yield from self.collective("all_reduce", "world", world, 8, "float64")
        yield Mark("update")
        shards = step.dp if step.run.optimizer.use_distributed_optimizer else 1
        # The check, norms by layer, the norm; then clipping, and Adam's gradient, master and moments: read and written.
        own_tensors, has_copies = whole.num_tensors / shards, step.item == 2 or shards > 1
        num_kernels = 22 + round(own_tensors) + 14 * whole.num_mixed
        yield Computation(num_bytes=4 * trained + 12 * trained // shards, num_kernels=num_kernels)
        yield from self.collective("all_reduce", "world", world, 1, "float32")
        yield Computation(num_bytes=38 * trained // shards, num_kernels=2 + round((2 + has_copies) * own_tensors))
        if step.run.optimizer.use_distributed_optimizer and not self.gathers_early:
            for buckets in self.buckets:
                for bucket, _ in buckets:
                    yield from self._gather_of_parameters(bucket)
