"""All that the ranks of a run do in a step, from recorded segments of its chunks: microbatches in the schedule's order,
their messages, sums of gradients, the update. One rank stands for its tensor- and data-parallel peers.

`schedule.py` asks megatron-core's own schedules for the same order; this is for --fit, which looks at hundreds of them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import zip_longest
from typing import Any

from megatron_peft.plan.cluster import Cluster
from megatron_peft.plan.recorded_layers import Pass, RecordedStep, Turn, turns
from megatron_peft.plan.timing import StepTime, WorkTime, part_of, step_time, time_alone
from megatron_peft.rehearsal.record import Call, Computation, Entry, Mark, Parameters, Wait


def estimated_time(step: RecordedStep, cluster: Cluster) -> StepTime:
    """The time of a step at this layout."""
    cluster = cluster.of_run(step.run)
    scheduled = {step.rank(stage): [*_Program(step, stage, cluster)] for stage in range(step.pp)}
    return step_time(scheduled, cluster)


# Those whose gradients are summed in one call, and their part of a chunk's work, from 0 to 1.
Bucket = tuple[Parameters, float]
_one_call = lru_cache(maxsize=10_000)(Call)  # the same object each time: a replay looks at it once


@lru_cache(maxsize=10_000)
def _of_size(message: Call) -> Call:
    return replace(message, shapes=((3,),), dtype="int64", batch=1)


class _Program:
    """Writes the program of one rank."""

    def __init__(self, step: RecordedStep, stage: int, cluster: Cluster) -> None:
        self.step, self.stage, self.cluster = step, stage, cluster
        self.chunks, self.rank, self.num_calls = step.chunks[stage], step.rank(stage), 0
        self.blocks: dict[tuple[Pass, int], WorkTime] = {}
        known: dict[Any, WorkTime] = {}  # most chunks are alike
        for number, chunk in enumerate(self.chunks):
            for phase in ("forward", "backward"):
                key = phase, step.segments(chunk)
                if key not in known:
                    known[key] = time_alone(step.entries(phase, chunk, stage), self.rank, cluster)
                self.blocks[phase, number] = known[key]
        self.whole = step.parameters(self.chunks)
        self.begin, self.end = (time_alone(entries, self.rank, cluster) for entries in step.built_once(stage))
        run = step.run
        self.gathers_early = run.optimizer.overlap_param_gather and step.dp > 1
        self.reduces_early = run.training.overlap_grad_reduce and step.dp > 1
        self.buckets = [self._buckets(chunk) for chunk in range(len(self.chunks))]
        self.gathers: list[int] = []
        self.sums: list[int] = []

    def __iter__(self) -> Iterator[Entry | WorkTime]:
        yield from self.start()
        yield from self.interleaved() if len(self.chunks) > 1 else self.plain()
        yield from self.finish()

    # Messages. Activations and their gradients go on axes of their own, so that their order does not matter where the
    # next stage is also the previous one.

    def send(self, turn: Turn, is_async: bool = False, batch: int | None = None) -> Iterator[Call]:
        """A turn's output, if it goes to another stage."""
        if self.sends(turn):
            yield self._message("send", turn.phase, 1 if turn.phase == "forward" else -1, is_async, batch)

    def receive(self, turn: Turn | None, is_async: bool = False, batch: int | None = None) -> Iterator[Call]:
        """A turn's input, if there is one and it comes from another stage."""
        if turn is not None and self.receives(turn):
            yield self._message("recv", turn.phase, -1 if turn.phase == "forward" else 1, is_async, batch)

    def _message(self, operation: str, phase: Pass, shift: int, is_async: bool, batch: int | None) -> Call:
        step, peer = self.step, self.step.rank((self.stage + shift) % self.step.pp)
        self.num_calls += 1
        return _one_call(operation, f"pipeline {phase}", (), ((step.own, step.h),), step.dtype, peer, batch, is_async)

    def sends(self, turn: Turn) -> bool:
        chunk = self.chunks[turn.chunk]
        return not (chunk.head if turn.phase == "forward" else chunk.embedding)

    def receives(self, turn: Turn) -> bool:
        chunk = self.chunks[turn.chunk]
        return not (chunk.embedding if turn.phase == "forward" else chunk.head)

    def compute(self, turn: Turn) -> Iterator[Entry | WorkTime]:
        yield Mark(turn.phase, turn.microbatch, turn.chunk)
        block, buckets = self.blocks[turn.phase, turn.chunk], self.buckets[turn.chunk]
        last = self.step.run.num_microbatches - 1
        if turn.phase == "forward" and turn.microbatch == 0 and self.gathers:
            # Where the layers of a bucket begin, their parameters are waited for, and those of the next one asked for.
            waits_for = self.gathers[turn.chunk]
            for (bucket, part), following in zip_longest(buckets, buckets[1:]):
                if bucket.num_trained:
                    yield Wait(waits_for)
                waits_for = self.num_calls
                if following is not None:
                    yield from self._gather_of_parameters(following[0], is_async=True)
                yield part_of(block, part)
        elif turn.phase == "backward" and turn.microbatch == last and self.reduces_early:
            for bucket, part in reversed(buckets):
                yield part_of(block, part)
                yield from self._sum_of_gradients(bucket, is_async=True)
        else:
            yield block

    def _buckets(self, chunk: int) -> list[Bucket]:
        """As megatron-core cuts the first chunk where sums overlap the backward; it cuts no other."""
        counts, step = self.step.parameters([self.chunks[chunk]]), self.step
        if chunk or not self.reduces_early:
            return [(counts, 1.0)]
        embedding = step.num_embedded * self.chunks[chunk].embedding
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
        is_exchanged = False  # whether a turn's input has come with the output of the one before it
        for turn, following in zip_longest(order, order[1:]):
            if not is_exchanged:
                yield from self._after_sizes(*self.receive(turn, batch=0))
            yield from self.compute(turn)
            is_exchanged = alternates and following and following.phase != turn.phase and self.sends(turn)
            comes_in = self.receive(following, batch=0) if is_exchanged else ()
            yield from self._after_sizes(*self.send(turn, batch=0), *comes_in)

    def _after_sizes(self, *messages: Call) -> Iterator[Call]:
        """Messages of one batch; where lengths vary, their shapes are exchanged first (`models/kernels.messages`)."""
        if messages and self.step.tells_sizes:
            self.num_calls += len(messages)
            yield from (_of_size(message) for message in messages)
        yield from messages

    def interleaved(self) -> Iterator[Entry | WorkTime]:
        """Messages run beside the computation: the next turn's input is asked for before this turn."""
        order = turns(self.stage, self.step.pp, len(self.chunks), self.step.run.num_microbatches)
        asked = self.num_calls
        yield from self.receive(order[0], is_async=True)
        for turn, following in zip_longest(order, order[1:]):
            waits_for, asked = asked, self.num_calls
            yield from self.receive(following, is_async=True)
            if self.receives(turn):
                yield Wait(waits_for)
            yield from self.compute(turn)
            yield from self.send(turn, is_async=True)

    # What a step has once.

    def collective(
        self, operation: str, axis: str, group: Sequence[int], size: int, dtype: str, is_async: bool = False
    ):
        if size > 0 and len(group) > 1:
            self.num_calls += 1
            yield Call(operation, axis, tuple(group), ((size,),), dtype, is_async=is_async)

    def _sum_of_gradients(self, bucket: Parameters, is_async: bool) -> Iterator[Call]:
        step, size = self.step, bucket.num_trained
        operation = "reduce_scatter" if step.run.optimizer.use_distributed_optimizer else "all_reduce"
        in_bf16 = step.run.training.grad_reduce_in_bf16 and step.item == 2
        self.sums += [self.num_calls] * bool(size and step.dp > 1)
        group = step.data_group(self.stage)
        yield from self.collective(operation, "data", group, size, "bfloat16" if in_bf16 else "float32", is_async)

    def _gather_of_parameters(self, bucket: Parameters, is_async: bool) -> Iterator[Call]:
        step, group = self.step, self.step.data_group(self.stage)
        shard = -(-bucket.trained // step.dp) + -(-bucket.trained_float32 // step.dp) * 4 // step.item
        yield from self.collective("all_gather", "data", group, shard, step.dtype, is_async)

    def start(self) -> Iterator[Entry | WorkTime]:
        """Gradients set to zero, blocks of rotations built, parameters gathered."""
        yield Mark("begin")
        yield Computation(num_bytes=4 * self.whole.num_trained, num_kernels=2)
        yield self.begin
        if self.gathers_early:
            for buckets in self.buckets:
                self.gathers.append(self.num_calls)
                yield from self._gather_of_parameters(buckets[0][0], is_async=True)

    def finish(self) -> Iterator[Entry | WorkTime]:
        """Sums of gradients, the check, the update."""
        step, whole, group = self.step, self.whole, self.step.data_group(self.stage)
        trained = whole.num_trained
        yield Mark("finish")
        yield self.end
        if self.reduces_early:
            yield from (Wait(number) for number in self.sums)
        else:
            for [(bucket, _)] in self.buckets:
                yield from self._sum_of_gradients(bucket, is_async=False)
        if step.is_full and step.shape.tied_embeddings and step.pp > 1 and self.stage in (0, step.pp - 1):
            ends = (step.rank(0), step.rank(step.pp - 1))
            yield from self.collective("all_reduce", "embedding", ends, step.num_embedded, "float32")
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
                    yield from self._gather_of_parameters(bucket, is_async=False)
