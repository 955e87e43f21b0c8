"""A run's ranks: each one's loading, start, step and validation, run by the training code on tensors without numbers.

What a rank computes, sends and holds is in its `RankRecord`. It reads the model's shape, no weights and no data: every
microbatch is as long as --seq-length allows. From the records of a few ranks and megatron-core's own schedule follow
the entries of every rank. Processes of this machine do it, on torch's fake process group (`runtime/fake_ranks.py`).
"""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import product
from multiprocessing.connection import wait
from threading import Thread
from typing import Any

from megatron.core.enums import ModelType
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import nn

from megatron_peft.config import ConfigurationError, ParallelConfig, RunConfig
from megatron_peft.models.gpt import transformer_config
from megatron_peft.models.kernels import Training
from megatron_peft.models.shape import ModelShape
from megatron_peft.rehearsal import rehearsed_rank, requests
from megatron_peft.rehearsal.program import MESSAGES, Call, Entry, Mark, RankRecord, RecordedLayers, Wait, check_order
from megatron_peft.rehearsal.rehearsed_rank import recorded_layers, rehearse_rank
from megatron_peft.rehearsal.requests import LayersToRecord, Lengths, RankToRehearse
from megatron_peft.runtime import fake_ranks
from megatron_peft.runtime.launch import model_parallel
from megatron_peft.runtime.progress import Advance, no_progress
from megatron_peft.runtime.ranks import Worker, preload

MOST_REPLICAS, MOST_RANKS = 8, 64  # whose calls are compared in `order_problem`


def rehearse(ranks: Sequence[RankToRehearse], watch: Advance = no_progress) -> list[RankRecord]:
    """The record of each rank. `watch` counts ranks."""
    return _in_processes([partial(rehearse_rank, rank) for rank in ranks], watch)


def record_layers(
    specs: Sequence[LayersToRecord], watch: Advance = no_progress, known: dict[str, RecordedLayers] | None = None
) -> list[RecordedLayers]:
    """The segments of each model, from as few layers as have all kinds of them. `watch` counts recordings.

    What is `known` already is not recorded again; this adds its own.
    """
    known = {} if known is None else known
    names = [repr(spec) for spec in specs]
    new = {name: partial(recorded_layers, spec) for name, spec in zip(names, specs, strict=True) if name not in known}
    known.update(zip(new, _in_processes([*new.values()], watch), strict=True))
    return [known[name] for name in names]


def start_planned_peak(config: RunConfig, shape: ModelShape) -> Callable[[], int | str | None]:
    """Rehearse rank 0 beside a run. What is returned gives its peak of all phases in bytes; None until it is known.

    A rehearsal that fails gives its error's last line: the run does not depend on it.
    """
    outcome: list[int | str] = []

    def rehearse_it() -> None:
        try:
            [record] = rehearse([RankToRehearse.of(config, shape, 0)])
            outcome.append(record.highest_peak)
        except Exception as error:
            outcome.append((str(error).strip() or repr(error)).splitlines()[-1])

    Thread(target=rehearse_it, daemon=True).start()
    return lambda: outcome[0] if outcome else None


_kept: list[Worker] | None = None  # those that have nothing to do, while any are kept


@contextmanager
def kept_processes() -> Iterator[None]:
    """What is rehearsed meanwhile, one call after another, is in the same processes."""
    global _kept
    if _kept is not None:
        yield
        return
    _kept = []
    try:
        yield
    finally:
        ended, _kept = _kept, None
        for worker in ended:
            worker.end()


def _in_processes(calls: Sequence[Callable[[], Any]], watch: Advance) -> list[Any]:
    """What these calls give, in processes forked from one that has torch.

    There are as many as this machine has cores, at most four: what a process's first call costs most is found in
    torch's caches by those that follow.
    """
    preload([rehearsed_rank.__name__])
    watch(0, len(calls))
    answers: list[Any] = [None] * len(calls)
    waiting, running = [*enumerate(calls)][::-1], dict[Any, tuple[Worker, int]]()
    workers: list[Worker] = []
    try:
        while len(workers) < min(len(os.sched_getaffinity(0)), 4, len(calls)):
            workers.append(_kept.pop() if _kept else Worker())
        free = [*workers]
        while waiting or running:
            while waiting and free:
                (at, call), worker = waiting.pop(), free.pop()
                worker.ask(partial(_answer, call))
                running[worker.connection] = worker, at
            for connection in wait([*running]):
                worker, at = running.pop(connection)
                answers[at] = worker.answer("a rehearsed rank")
                if isinstance(answers[at], Exception):
                    raise answers[at]
                free.append(worker)
                watch(1, 0)
        if _kept is not None:
            _kept.extend(workers)
            workers = []
    finally:  # none is left after an error and Ctrl-C
        for worker in workers:
            worker.end()
    return answers


def _answer(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except ConfigurationError as error:
        return error


# The entries of every rank of a run.
#
# A rehearsed step has a few microbatches. The first, the last and one between them stand for all: the real schedule of
# a stage is run with the run's true number of microbatches, and where it calls a forward or a backward the recorded one
# is put. Ranks of a stage differ in nothing but their numbers.


@dataclass(frozen=True)
class RankGrid:
    """How megatron-core numbers ranks: tensor-parallel ones are neighbors, stages lie farthest apart."""

    tensor: int
    data: int
    pipeline: int

    @classmethod
    def of(cls, parallel: ParallelConfig) -> "RankGrid":
        tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
        return cls(tp, parallel.data_parallel_size, pp)

    @property
    def size(self) -> int:
        return self.tensor * self.data * self.pipeline

    def rank(self, tensor: int, data: int, stage: int) -> int:
        return tensor + self.tensor * (data + self.data * stage)

    def place(self, rank: int) -> tuple[int, int, int]:
        """(tensor, data, stage)"""
        return rank % self.tensor, rank // self.tensor % self.data, rank // (self.tensor * self.data)

    def ranks(self, tensor: Iterable[int], data: Iterable[int], stages: Iterable[int]) -> tuple[int, ...]:
        """The global ranks of these tensor- and data-parallel ones of these stages, in the order of their numbers."""
        return tuple(self.rank(*place[::-1]) for place in product(stages, data, tensor))


@dataclass(frozen=True)
class StageProgram:
    """What every rank of a stage does in a step."""

    grid: RankGrid  # of the run
    rank: int  # that `entries` belong to; the others of the stage do the same with other partners
    entries: tuple[Entry, ...]

    def of_rank(self, rank: int, grid: RankGrid | None = None) -> Iterator[Entry]:
        """The entries of another rank of the stage, of `grid` if it is given: one with another number of replicas."""
        moved: dict[int, Call] = {}  # by id: the schedule repeats the same calls
        for entry in self.entries:
            if isinstance(entry, Call):
                if id(entry) not in moved:
                    moved[id(entry)] = self._moved(entry, rank, grid or self.grid)
                entry = moved[id(entry)]
            yield entry

    def _moved(self, call: Call, rank: int, grid: RankGrid) -> Call:
        # Along an axis a group holds the places that it held, and all replicas; elsewhere it is where the rank is.
        tensor, data, _ = own = grid.place(rank)
        recorded = _places(self.grid, call.group)
        along = [places if len(places) > 1 else [here] for places, here in zip(recorded, own, strict=True)]
        group = grid.ranks(along[0], range(grid.data) if len(along[1]) > 1 else along[1], along[2])
        if call.peer is None:
            return replace(call, group=group)
        if call.operation not in MESSAGES:
            return replace(call, group=group, peer=group[call.group.index(call.peer)])
        return replace(call, group=group, peer=grid.rank(tensor, data, self.grid.place(call.peer)[2]))


@lru_cache(maxsize=1000)
def _places(grid: RankGrid, group: Sequence[int]) -> list[list[int]]:
    """The places of a group's ranks on each of the three axes, ascending."""
    return [sorted({*places}) for places in zip(*map(grid.place, group), strict=True)]


def programs_of_ranks(stages: Sequence[StageProgram], grid: RankGrid) -> dict[int, Iterator[Entry]]:
    """The entries of every rank of `grid`, which may have another number of replicas than the programs' own.

    They are made while they are gone through: those of all ranks at once fill gigabytes.
    """
    return {rank: stages[grid.place(rank)[2]].of_rank(rank, grid) for rank in range(grid.size)}


def program_of_stage(
    record: RankRecord, stage: int, schedule: Sequence[Entry], grid: RankGrid, num_microbatches: int
) -> StageProgram:
    """The program of a stage, from the record of a rank of it, or of a stage that holds the same kinds of layers.

    `schedule` has the marks and messages of the stage (`schedules_of_stages`).
    """
    messages = {call.operation: call for call in record.calls if call.operation in MESSAGES and call.dtype != "int64"}
    parts, (tensor, data, _), whole = _cut_at_marks(record), grid.place(record.rank), tuple(range(grid.size))
    entries = [*parts["begin", None, 0]]
    for entry in schedule:
        if isinstance(entry, Call | Wait) and entry.handle is not None:
            entry = replace(entry, handle=f"schedule {entry.handle}")  # the recorded parts have other handles
        if isinstance(entry, Call):
            assert entry.peer is not None
            like = entry if entry.dtype == "int64" else messages[entry.operation]  # such a message tells a shape
            group = whole if entry.axis == "world" else grid.ranks([tensor], [data], range(grid.pipeline))
            peer = grid.rank(tensor, data, entry.peer)
            entry = replace(entry, group=group, peer=peer, shapes=like.shapes, dtype=like.dtype)
        entries.append(entry)
        if isinstance(entry, Mark) and entry.phase in ("forward", "backward"):
            number, most = entry.microbatch or 0, record.num_microbatches
            if most < num_microbatches and number > 0:  # it is like the last one that was recorded, or one between
                number = most - 1 if number == num_microbatches - 1 else most // 2
            entries += parts[entry.phase, number, entry.chunk]
        elif isinstance(entry, Mark) and entry.phase == "finish":
            entries += parts["finish", None, 0]
    entries += [Mark("update"), *parts["update", None, 0]]
    own_rank = grid.rank(tensor, data, stage)
    return StageProgram(grid, own_rank, tuple(StageProgram(grid, record.rank, tuple(entries)).of_rank(own_rank)))


def _cut_at_marks(record: RankRecord) -> dict[tuple[str, int | None, int], list[Entry]]:
    """A record, cut at its marks: phase, microbatch, chunk -> its entries. The schedule's own are made anew."""
    part: list[Entry] = []
    by_mark: dict[tuple[str, int | None, int], list[Entry]] = {("begin", None, 0): part}
    for entry in record.entries:
        if isinstance(entry, Mark):
            part = by_mark.setdefault((entry.phase, entry.microbatch, entry.chunk), [])
            continue
        if part is by_mark["begin", None, 0] and isinstance(entry, Call) and entry.operation in MESSAGES:
            part = []  # the schedule has begun
        part.append(entry)
    return by_mark


def schedules_of_stages(config: RunConfig, shape: ModelShape) -> list[tuple[Entry, ...]]:
    """Marks and messages of each pipeline stage in program order, from megatron-core's schedule of empty chunks.

    The fake world has one rank for each stage: peers are stages. Messages are of one number; `program_of_stage` puts
    their true shapes in. In a process that has run no other fake rank.
    """
    parallel, transformer = config.parallel, config.model.transformer
    num_stages, num_chunks = parallel.pipeline_model_parallel_size, parallel.num_virtual_stages(shape.num_layers)
    core: Any = transformer_config(shape, config.model.bf16, transformer, parallel, Training.of(config))
    core.hidden_size, core.sequence_parallel = 1, False
    of_stages = ParallelConfig(1, num_stages, world_size=num_stages)
    schedules: list[tuple[Entry, ...]] = []
    for stage in range(num_stages):
        with fake_ranks.fake_world(stage, num_stages), model_parallel(of_stages, config.training.seed, num_chunks):
            recorder = rehearsed_rank.Watch({}, keeps_work=False)
            core.finalize_model_grads_func = lambda *_, mark=recorder.mark, **__: mark("finish")
            chunks: list[Any] = [nn.Module() for _ in range(num_chunks or 1)]
            for number, chunk in enumerate(chunks):  # a schedule asks for the configuration alone
                chunk.config, chunk.vp_stage = core, number if num_chunks else None
                chunk.model_type = ModelType.encoder_or_decoder
            iterators: list[Any] = [iter(()) for _ in chunks]
            with fake_ranks.shapes_as_asked(), fake_ranks.idle_steps(), recorder.watching():
                get_forward_backward_func()(
                    forward_step_func=None,
                    data_iterator=iterators if parallel.is_interleaved else iterators[0],
                    model=chunks,
                    num_microbatches=config.num_microbatches,
                    seq_length=1,
                    micro_batch_size=1,
                )
        schedules.append(recorder.entries())
    return schedules


@dataclass(frozen=True)
class RehearsedRun:
    """A run of which some ranks were rehearsed."""

    config: RunConfig
    shape: ModelShape
    # Of every stage that holds something else, the rank with most microbatches in flight; the first, second, middle and
    # last stage; and a second tensor-parallel rank.
    records: tuple[RankRecord, ...]
    stages: tuple[StageProgram, ...]  # of every stage, with all of the run's microbatches
    alike: Sequence[int]  # of every stage, the rehearsed one that holds the same

    @property
    def grid(self) -> RankGrid:
        return RankGrid.of(self.config.parallel)

    def parameters(self) -> dict[str, int]:
        """Those of the whole model, "trained" and "frozen"; each global parameter counts once."""
        of_stage = {record.stage: record.parameters for record in self.records}
        return {
            kind: sum(of_stage[stage][f"{kind} of stage"] for stage in self.alike) for kind in ("trained", "frozen")
        }

    def programs(self) -> dict[int, Iterator[Entry]]:
        """The entries of every rank; of more than two replicas, of two, which stand for all."""
        return programs_of_ranks(self.stages, replace(self.grid, data=min(self.grid.data, 2)))


def rehearse_run(
    config: RunConfig, shape: ModelShape, peaks: bool = True, watch: Advance = no_progress
) -> RehearsedRun:
    """Rehearse the distinct ranks of a run's world, which need not exist. `watch` counts them.

    Without `peaks` of memory the records tell what ranks compute and call, in less time.
    """
    grid, alike = RankGrid.of(config.parallel), requests.alike_stages(config, shape)
    stages = {*alike, 0, min(1, grid.pipeline - 1), grid.pipeline // 2, grid.pipeline - 1} if peaks else {*alike}
    places = [grid.rank(0, 0, stage) for stage in sorted(stages)]
    if peaks and grid.tensor > 1:
        places.append(grid.rank(1, 0, grid.pipeline - 1))
    ranks = (RankToRehearse.of(config, shape, rank, peaks) for rank in places)
    calls = [partial(schedules_of_stages, config, shape), *(partial(rehearse_rank, rank) for rank in ranks)]
    schedules, *records = _in_processes(calls, watch)
    of_rank = dict(zip(places, records, strict=True))
    like = [of_rank[grid.rank(0, 0, stage)] for stage in alike]
    programs = [
        program_of_stage(record, stage, entries, grid, config.num_microbatches)
        for stage, (record, entries) in enumerate(zip(like, schedules, strict=True))
    ]
    return RehearsedRun(config, shape, tuple(records), tuple(programs), alike)


def order_problem(run: RehearsedRun, watch: Advance = no_progress) -> str | None:
    """The first problem of the calls of any rank; None: all end.

    Every rank of a small run (`requests.make_small`) is rehearsed from the model to a checkpoint, and their programs
    are replayed: one rank may do something else than another if those that it does it with do so too. Then a step of
    the run itself is replayed, with all of its layers, stages and microbatches.
    """
    if run.grid.size == 1:
        return None
    stages = requests.kept_stages(run.grid.pipeline)
    few = len(stages) if run.config.parallel.is_interleaved else 2
    config, shape = requests.make_small(run.config, run.shape, run.grid.tensor, MOST_REPLICAS, few)
    config = replace(config, checkpoint=replace(config.checkpoint, save="never written"))
    grid, lengths = RankGrid.of(config.parallel), Lengths.longest(config)
    every = rehearsed = [grid.place(rank) for rank in range(grid.size)]
    if grid.size > MOST_RANKS:  # every tensor-parallel rank of a replica, and one of each replica
        rehearsed = [place for place in every if 0 in place[:2]]
    ranks = [
        RankToRehearse(config, shape, grid.rank(*place), config.num_microbatches, lengths, calls_alone=True)
        for place in rehearsed
    ]
    records = dict(zip(rehearsed, rehearse(ranks, watch), strict=True))
    programs: dict[int, Iterable[Entry]] = {}
    for tensor, data, stage in every:
        record, rank = records.get((tensor, data, stage)) or records[tensor, 0, stage], grid.rank(tensor, data, stage)
        recorded = StageProgram(grid, record.rank, record.entries)
        programs[rank] = record.entries if record.rank == rank else recorded.of_rank(rank)

    def of_the_run(rank: re.Match[str]) -> str:
        tensor, data, stage = grid.place(int(rank[1]))
        return f"rank {run.grid.rank(tensor, data, stages[stage])}"

    problem = check_order(programs, whole_runs=True)
    return check_order(run.programs()) if problem is None else re.sub(r"\brank (\d+)", of_the_run, problem)
