"""All that the ranks of a run do in a step, from recorded segments of its chunks: microbatches in the schedule's order,
their messages, sums of gradients, the update. One rank stands for its tensor- and data-parallel peers.

`schedule.py` asks megatron-core's own schedules for the same order; this is for --fit, which looks at hundreds of them.
"""

from collections.abc import Iterator, Sequence
from functools import cache
from itertools import zip_longest
from typing import Any

from megatron_peft.plan.cluster import Cluster
from megatron_peft.plan.recorded_layers import Pass, RecordedStep, Turn, turns
from megatron_peft.plan.timing import StepTime, WorkTime, part_of, step_time, time_alone
from megatron_peft.rehearsal.program import Call, Computation, Entry, Mark, Parameters, Segment, Wait


def estimated_time(step: RecordedStep, cluster: Cluster) -> StepTime:
    """The time of a step at this layout."""
    cluster = cluster.of_run(step.run)
    scheduled = {step.rank(stage): [*_Program(step, stage, cluster)] for stage in range(step.pp)}
    return step_time(scheduled, cluster)


# Those whose gradients are summed in one call, and their part of a chunk's work, from 0 to 1.
Bucket = tuple[Parameters, float]
_one_call = cache(Call)  # the same object each time: a replay looks at it once


class _Program:
    """Writes the program of one rank."""

    def __init__(self, step: RecordedStep, stage: int, cluster: Cluster) -> None:
        self.step, self.stage, self.cluster = step, stage, cluster
        self.chunks, self.rank = step.chunks[stage], step.rank(stage)

        @cache  # most chunks are alike
        def time(phase: Pass, segments: Sequence[Segment]) -> WorkTime:
            return time_alone(step.entries(phase, segments, stage), self.rank, cluster)

        self.blocks = {
            (phase, number): time(phase, step.segments(chunk))
            for number, chunk in enumerate(self.chunks)
            for phase in ("forward", "backward")
        }
        self.whole = step.parameters(self.chunks)
        run = step.run
        self.gathers_early = run.optimizer.overlap_param_gather and step.dp > 1
        self.reduces_early = run.training.overlap_grad_reduce and step.dp > 1
        self.buckets = [self._buckets(chunk) for chunk in range(len(self.chunks))]
        self.sums: list[str] = []  # handles

    def __iter__(self) -> Iterator[Entry | WorkTime]:
        yield from self.start()
        yield from self.interleaved() if len(self.chunks) > 1 else self.plain()
        yield from self.finish()

    def message(self, operation: str, turn: Turn | None, **posted: Any) -> tuple[Call, ...]:
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

    def compute(self, turn: Turn) -> Iterator[Entry | WorkTime]:
        yield Mark(turn.phase, turn.microbatch, turn.chunk)
        block, buckets = self.blocks[turn.phase, turn.chunk], self.buckets[turn.chunk]
        last = self.step.run.num_microbatches - 1
        if turn.phase == "forward" and turn.microbatch == 0 and self.gathers_early:
            # Where the layers of a bucket begin, their parameters are waited for, and those of the next one asked for.
            for number, ((bucket, part), following) in enumerate(zip_longest(buckets, buckets[1:])):
                if bucket.num_trained:
                    yield Wait(f"gather {turn.chunk} {number}")
                if following is not None:
                    yield from self._gather_of_parameters(following[0], f"gather {turn.chunk} {number + 1}")
                yield part_of(block, part)
        elif turn.phase == "backward" and turn.microbatch == last and self.reduces_early:
            for number, (bucket, part) in enumerate(reversed(buckets)):
                yield part_of(block, part)
                yield from self._sum_of_gradients(bucket, f"sum {turn.chunk} {number}")
        else:
            yield block

    def _buckets(self, chunk: int) -> list[Bucket]:
        """As megatron-core cuts the first chunk where sums overlap the backward; it cuts no other."""
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
            yield from (_one_call(one.operation, one.axis, (), ((3,),), "int64", one.peer, batch=1) for one in messages)
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
            ends = (step.rank(0), step.rank(step.pp - 1))
            yield from self.collective(
                "all_reduce", "embedding", ends, step.layers.parameters["embedding"].trained, "float32"
            )
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
