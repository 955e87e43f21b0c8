"""The entries of every rank of a run, from the rehearsed ranks and megatron-core's own schedule.

A rehearsed step has a few microbatches. The first, the last and one between them stand for all: `stage_schedule.py`
runs the real schedule of a stage with the run's true number of microbatches, and where it calls a forward or a backward
the recorded one is put. Ranks of a stage differ in nothing but their numbers.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from megatron_peft.config import ParallelConfig
from megatron_peft.rehearsal.record import MESSAGES, Call, Entry, Mark, RankRecord, Wait


@dataclass(frozen=True)
class RankGrid:
    """Which ranks a group of megatron-core's holds: tensor-parallel ranks are neighbors, stages lie farthest apart."""

    tensor: int
    data: int
    pipeline: int

    @classmethod
    def of(cls, parallel: ParallelConfig) -> "RankGrid":
        """Of a run."""
        return cls(
            parallel.tensor_model_parallel_size, parallel.data_parallel_size, parallel.pipeline_model_parallel_size
        )

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self.tensor * self.data * self.pipeline

    def rank(self, tensor: int, data: int, stage: int) -> int:
        """Global rank of a place."""
        return tensor + self.tensor * (data + self.data * stage)

    def place(self, rank: int) -> tuple[int, int, int]:
        """(tensor, data, stage)"""
        return rank % self.tensor, rank // self.tensor % self.data, rank // (self.tensor * self.data)

    def group(self, axis: str, rank: int) -> tuple[int, ...]:
        """The ranks of the group of this name (`recording.group_names`) that holds `rank`, in its order."""
        tensor, data, stage = self.place(rank)
        every_tensor, every_stage = range(self.tensor), range(self.pipeline)
        every_data = range(self.data)
        match axis.removesuffix(" with context"):
            case "tensor":
                places = [(t, data, stage) for t in every_tensor]
            case "data" | "data of an optimizer instance":
                places = [(tensor, d, stage) for d in every_data]
            case "pipeline":
                places = [(tensor, data, p) for p in every_stage]
            case "model":
                places = [(t, data, p) for p in every_stage for t in every_tensor]
            case "tensor and data":
                places = [(t, d, stage) for d in every_data for t in every_tensor]
            case "embedding":
                places = [(tensor, data, p) for p in dict.fromkeys((0, self.pipeline - 1))]
            case "world" | "optimizer instance":
                places = [self.place(one) for one in range(self.size)]
            case _:
                raise KeyError(axis)
        return tuple(self.rank(*place) for place in places)


@dataclass(frozen=True)
class StageProgram:
    """What every rank of a stage does in a step.

    Args:
        grid: of the run.
        rank: the rank that `entries` belong to; the others of the stage do the same with other partners.
        entries: in program order.
    """

    grid: RankGrid
    rank: int
    entries: tuple[Entry, ...]

    def of_rank(self, rank: int, grid: RankGrid | None = None) -> Iterator[Entry]:
        """The entries of another rank of the stage, of `grid` if it is given: one with another number of replicas."""
        moved: dict[int, Call] = {}  # by id: the schedule repeats the same calls
        for entry in self.entries:
            if isinstance(entry, Call):
                if id(entry) not in moved:
                    moved[id(entry)] = self._moved(entry, rank, grid or self.grid)
                yield moved[id(entry)]
            else:
                yield entry

    def _moved(self, call: Call, rank: int, grid: RankGrid) -> Call:
        group = grid.group(call.axis, rank)
        if call.peer is None:
            return replace(call, group=group)
        if call.operation not in ("send", "recv"):
            return replace(call, group=group, peer=group[call.group.index(call.peer)])
        tensor, data, _ = grid.place(rank)
        return replace(call, group=group, peer=grid.rank(tensor, data, self.grid.place(call.peer)[2]))


def program_of_stage(
    record: RankRecord, stage: int, schedule: Sequence[Entry], grid: RankGrid, num_microbatches: int
) -> StageProgram:
    """The program of a stage, from the record of a rank of it, or of a stage that holds the same kinds of layers.

    Args:
        schedule: marks and messages of the stage, as `stage_schedule.schedule_of_stage` gives them; peers are stages.
    """
    messages = {call.operation: call for call in record.calls if call.operation in MESSAGES and call.dtype != "int64"}
    recorded, program = _Recorded(record), _Program()
    tensor, data, _ = grid.place(record.rank)
    program.paste(recorded.parts["begin"])
    for entry in schedule:
        if isinstance(entry, Call):
            assert entry.peer is not None
            peer = grid.rank(tensor, data, entry.peer)
            tells_shape = entry.dtype == "int64"
            like = entry if tells_shape else messages[entry.operation]
            program.add_message(replace(entry, peer=peer, shapes=like.shapes, dtype=like.dtype))
        elif isinstance(entry, Wait):
            program.wait_for_message(entry.call)
        elif isinstance(entry, Mark):
            program.add(entry)
            if entry.phase in ("forward", "backward"):
                program.paste(recorded.microbatch(entry, num_microbatches))
            elif entry.phase == "finish":
                program.paste(recorded.parts["finish"])
    program.add(Mark("update"))
    program.paste(recorded.parts["update"])
    own_rank = grid.rank(tensor, data, stage)
    return StageProgram(
        grid, own_rank, tuple(StageProgram(grid, record.rank, tuple(program.entries)).of_rank(own_rank))
    )


@dataclass
class _Numbered:
    """A recorded entry; `call`: its number among the recorded calls, if it is one."""

    entry: Entry
    call: int | None = None


class _Recorded:
    """A record, cut at its marks."""

    def __init__(self, record: RankRecord) -> None:
        self.num_microbatches = record.num_microbatches
        self.parts: dict[str, list[_Numbered]] = {"begin": [], "finish": [], "update": []}
        self._of: dict[tuple[str, int | None, int], list[_Numbered]] = {}
        part, num_calls = self.parts["begin"], 0
        for entry in record.entries:
            if isinstance(entry, Mark):
                if entry.phase in ("forward", "backward"):
                    part = self._of.setdefault((entry.phase, entry.microbatch, entry.chunk), [])
                else:
                    part = self.parts.get(entry.phase, [])  # messages of the schedule are made anew
                continue
            is_call = isinstance(entry, Call)
            if part is self.parts["begin"] and isinstance(entry, Call) and entry.operation in ("send", "recv"):
                part = []  # the schedule has begun
            part.append(_Numbered(entry, num_calls if is_call else None))
            num_calls += is_call

    def microbatch(self, mark: Mark, of: int) -> list[_Numbered]:
        """The recorded microbatch that is like `mark.microbatch` of `of`: the first, the last, or one between."""
        number = mark.microbatch or 0
        if of != self.num_microbatches:
            number = 0 if number == 0 else self.num_microbatches - 1 if number == of - 1 else self.num_microbatches // 2
        return self._of[mark.phase, number, mark.chunk]


class _Program:
    """Entries put together; waits keep meaning the calls that they meant."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self._num_calls = 0
        self._recorded: dict[int, int] = {}  # number of a recorded call -> of its latest copy here
        self._messages: list[int] = []

    def add(self, entry: Entry) -> None:
        self.entries.append(entry)
        self._num_calls += isinstance(entry, Call)

    def paste(self, part: Iterable[_Numbered]) -> None:
        for one in part:
            if isinstance(one.entry, Wait):
                if one.entry.call in self._recorded:  # else it is for a call of an earlier step
                    self.add(Wait(self._recorded[one.entry.call]))
                continue
            if one.call is not None:
                self._recorded[one.call] = self._num_calls
            self.add(one.entry)

    def add_message(self, call: Call) -> None:
        self._messages.append(self._num_calls)
        self.add(call)

    def wait_for_message(self, number: int) -> None:
        self.add(Wait(self._messages[number]))


@dataclass(frozen=True)
class RankProgram:
    """The entries of a rank, made each time that they are gone through: those of all ranks at once fill gigabytes.

    Args:
        stage: the program of its stage.
        rank, grid: it, and the world that it is of, which may have another number of replicas than the stage's own.
    """

    stage: StageProgram
    rank: int
    grid: RankGrid

    def __iter__(self) -> Iterator[Entry]:
        return self.stage.of_rank(self.rank, self.grid)


def renumbered(entries: Iterable[Entry], numbers: Mapping[int, int]) -> Iterator[Entry]:
    """A program of ranks that have other numbers elsewhere."""
    for entry in entries:
        if isinstance(entry, Call):
            peer = None if entry.peer is None else numbers[entry.peer]
            entry = replace(entry, group=tuple(numbers[rank] for rank in entry.group), peer=peer)
        yield entry


def programs_of_ranks(stages: Sequence[StageProgram], grid: RankGrid) -> dict[int, RankProgram]:
    """The entries of every rank of `grid`, which may have another number of replicas than the programs' own."""
    return {rank: RankProgram(stages[grid.place(rank)[2]], rank, grid) for rank in range(grid.size)}
