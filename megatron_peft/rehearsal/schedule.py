"""The entries of every rank of a run, from the rehearsed ranks and megatron-core's own schedule.

A rehearsed step has a few microbatches. The first, the last and one between them stand for all: the real schedule of a
stage is run with the run's true number of microbatches, and where it calls a forward or a backward the recorded one is
put. Ranks of a stage differ in nothing but their numbers.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from typing import Any

from megatron.core.enums import ModelType
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import nn

from megatron_peft.config import ParallelConfig, RunConfig
from megatron_peft.models.gpt import transformer_config
from megatron_peft.models.kernels import Training
from megatron_peft.models.shape import ModelShape
from megatron_peft.rehearsal.program import MESSAGES, Call, Entry, Mark, RankRecord, Wait
from megatron_peft.rehearsal.recorder import Recorder, group_names
from megatron_peft.runtime.fake_ranks import fake_world, idle_steps, shapes_as_asked, watched_batches, watched_schedule
from megatron_peft.runtime.launch import model_parallel


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


def renumbered(entries: Iterable[Entry], numbers: Mapping[int, int]) -> Iterator[Entry]:
    """A program of ranks that have other numbers elsewhere."""
    for entry in entries:
        if isinstance(entry, Call):
            peer = None if entry.peer is None else numbers[entry.peer]
            entry = replace(entry, group=tuple(numbers[rank] for rank in entry.group), peer=peer)
        yield entry


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
    found: dict[tuple[str, int | None, int], list[Entry]] = {("begin", None, 0): part}
    for entry in record.entries:
        if isinstance(entry, Mark):
            part = found.setdefault((entry.phase, entry.microbatch, entry.chunk), [])
            continue
        if part is found["begin", None, 0] and isinstance(entry, Call) and entry.operation in MESSAGES:
            part = []  # the schedule has begun
        part.append(entry)
    return found


def schedules_of_stages(config: RunConfig, shape: ModelShape) -> list[tuple[Entry, ...]]:
    """Marks and messages of each pipeline stage in program order, from megatron-core's schedule of empty chunks.

    In a process of its own, whose fake world has one rank for each stage: peers are stages. Messages are of one number;
    `program_of_stage` puts their true shapes in.
    """
    return [_schedule(config, shape, stage) for stage in range(config.parallel.pipeline_model_parallel_size)]


def _schedule(config: RunConfig, shape: ModelShape, stage: int) -> tuple[Entry, ...]:
    parallel, transformer = config.parallel, config.model.transformer
    num_stages, num_chunks = parallel.pipeline_model_parallel_size, parallel.num_virtual_stages(shape.num_layers)
    core: Any = transformer_config(shape, config.model.bf16, transformer, parallel, Training.of(config))
    core.hidden_size, core.sequence_parallel = 1, False
    of_stages = ParallelConfig(1, num_stages, world_size=num_stages)
    with fake_world(stage, num_stages), model_parallel(of_stages, config.training.seed, num_chunks):
        recorder = Recorder(group_names(), keeps_work=False)
        core.finalize_model_grads_func = lambda *args, **kwargs: recorder.mark("finish")
        chunks: list[Any] = [nn.Module() for _ in range(num_chunks or 1)]
        for number, chunk in enumerate(chunks):  # a schedule asks for the configuration alone
            chunk.config, chunk.vp_stage = core, number if num_chunks else None
            chunk.model_type = ModelType.encoder_or_decoder
        iterators: list[Any] = [iter(()) for _ in chunks]
        watched = watched_schedule(recorder.mark), watched_batches(recorder.batch)
        with shapes_as_asked(), idle_steps(), watched[0], watched[1], recorder:
            get_forward_backward_func()(
                forward_step_func=None,
                data_iterator=iterators if parallel.is_interleaved else iterators[0],
                model=chunks,
                num_microbatches=config.num_microbatches,
                seq_length=1,
                micro_batch_size=1,
            )
    return recorder.entries()
