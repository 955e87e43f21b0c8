"""What a rehearsal finds of one rank: its computation and its calls in program order, its parameters, its peak memory.

And whether the calls of all ranks fit together (`check_order`). Plain data without torch.
"""

from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from operator import attrgetter
from typing import Any, Literal, NoReturn

Phase = Literal["begin", "forward", "schedule", "backward", "finish", "update", "start", "step", "validation", "saving"]
PHASES = ("loading", "start", "step", "validation", "saving")  # of a run; "start" is LoRA-GA's

ITEM_BYTES = {
    "complex128": 16,
    **dict.fromkeys(("float64", "int64", "complex64"), 8),
    **dict.fromkeys(("float32", "int32"), 4),
    **dict.fromkeys(("bfloat16", "float16", "int16"), 2),
    **dict.fromkeys(("int8", "uint8", "bool"), 1),
}


@dataclass(frozen=True)
class Product:
    """`batch` products [m, k] [k, n]; or attention of `batch` heads, m queries by n keys, with heads of k features.

    Attention counts whole squares, both products: a causal mask halves what is computed of it.
    """

    kind: Literal["mm", "attention", "attention backward"]
    batch: int
    m: int
    n: int
    k: int
    dtype: str

    @property
    def flops(self) -> int:
        """2 for each multiply and add; attention has two products, and five in backward (scores are recomputed)."""
        num_products = {"mm": 1, "attention": 2, "attention backward": 5}[self.kind]
        num_real = 4 if self.dtype.startswith("complex") else 1  # products
        return 2 * num_products * num_real * self.batch * self.m * self.n * self.k

    @property
    def num_bytes(self) -> int:
        """Both factors and the result, once each; of attention queries, keys, values and the result."""
        if self.kind == "mm":
            return self.batch * (self.m * self.k + self.k * self.n + self.m * self.n) * ITEM_BYTES[self.dtype]
        times = 1 if self.kind == "attention" else 2
        return times * self.batch * 2 * (self.m + self.n) * self.k * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class Computation:
    """What a rank computes between two calls."""

    products: Mapping[Product, int] = field(default_factory=dict)  # how often each was computed
    num_bytes: int = 0  # read and written by all other operations
    num_kernels: int = 0  # operations launched, products among them


@dataclass(frozen=True)
class Call:
    """A collective or a message."""

    operation: str  # "all_reduce", "all_gather", "reduce_scatter", "broadcast", "all_to_all", "barrier", "send", "recv"
    axis: str  # the process group, as "tensor", "data", "pipeline", "world": two groups may have the same ranks
    group: tuple[int, ...]  # its global ranks, in its order
    # Of the tensors that this rank puts in (of a "recv": that it gets); several if they are coalesced. Of "all_gather"
    # the own shard, of "reduce_scatter" all shards.
    shapes: tuple[tuple[int, ...], ...]
    dtype: str
    peer: int | None = None  # global rank of the other side of a message, or the source of a broadcast
    batch: int | None = None  # messages with the same number are posted together, and waited for together
    # Of an asynchronous call; a `Wait` for it says where it is waited for. Calls that follow one another may have the
    # same. None: it is waited for at once.
    handle: int | str | None = None

    @property
    def is_async(self) -> bool:
        return self.handle is not None

    @property
    def num_bytes(self) -> int:
        return sum(prod(shape) for shape in self.shapes) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class Wait:
    """Where the latest call with this handle is waited for."""

    handle: int | str


@dataclass(frozen=True)
class EarlyUse:
    """Where what the call with this handle writes is used, although nobody has waited for it."""

    handle: int | str


@dataclass(frozen=True)
class Mark:
    """What follows belongs to this phase of a step, or of a whole run (`PHASES`).

    "begin" is what comes before the first microbatch, "forward" and "backward" are of a microbatch, "schedule" is what
    megatron-core's schedule does between them (messages), "finish" sums gradients, "update" is all that follows.
    """

    phase: Phase
    microbatch: int | None = None  # number within the step; None outside forward and backward
    chunk: int = 0  # of the interleaved schedule


Entry = Computation | Call | Wait | EarlyUse | Mark
MESSAGES = ("send", "recv")
Memory = dict[str, int]  # bytes of each part at the moment of the peak; their sum is the peak


@dataclass(frozen=True)
class RankRecord:
    """One rank's step in program order, and its peaks."""

    rank: int
    stage: int
    num_microbatches: int  # of the step in `entries`; the run may have more
    entries: tuple[Entry, ...]
    parameters: Mapping[str, int]  # number of elements on this rank, "trained" and "frozen"
    # By phase (`PHASES`) and part: "weights", "gradients", "optimizer", "buffers", "temporary", and "activations of
    # KIND" of each kind of layer.
    peaks: Mapping[str, Memory]

    @property
    def calls(self) -> Iterator[Call]:
        return (entry for entry in self.entries if isinstance(entry, Call))

    def peak(self, phase: str) -> int:
        return sum(self.peaks[phase].values())

    @property
    def highest_peak(self) -> int:
        return max(map(self.peak, self.peaks))


@dataclass(frozen=True)
class RecordedPass:
    """One microbatch's forward or backward through a segment of a model, or what is done once a step."""

    entries: tuple[Entry, ...] = ()
    left: int = 0  # bytes that it leaves behind, and their peak, both relative to its begin
    peak: int = 0


# "embedding", "head", "before" and "first" (`LayersToRecord`); another layer is named by its targets.
Segment = str | frozenset[str]
ENDS = ("embedding", "head")


@dataclass(frozen=True)
class Parameters:
    """Numbers of a model's segment on a tensor-parallel rank."""

    weight_bytes: int = 0
    buffer_bytes: int = 0
    trained: int = 0  # elements in the run's own type, with master parameters beside them where it is not float32
    trained_float32: int = 0  # in a run of another type, those in float32: their own masters
    partial: int = 0  # trained ones whose gradients are summed over the tensor-parallel ranks
    num_tensors: int = 0  # trained ones
    largest: int = 0  # elements of the largest trained one
    num_mixed: int = 0  # linear layers that mix a low rank with a rotation

    @property
    def num_trained(self) -> int:
        return self.trained + self.trained_float32

    @classmethod
    def sum(cls, several: "Iterable[Parameters]") -> "Parameters":
        parts = [*several]
        total = cls(*map(sum, zip(*(tuple(vars(part).values()) for part in parts), strict=True)))
        return replace(total, largest=max((part.largest for part in parts), default=0))


@dataclass(frozen=True, eq=False)
class RecordedLayers:
    """The segments of a model, and what is built once a step for the layers that were recorded."""

    # ("forward" or "backward", segment) -> one microbatch's; ("begin", "") and ("finish", "") -> what is done before
    # the first microbatch and after the last, for all layers. What does nothing may be missing.
    passes: Mapping[tuple[str, Segment], RecordedPass]
    parameters: Mapping[Segment, Parameters]
    fixed_kernels: Mapping[str, float]  # "begin", "finish" -> part of its kernels that any number of layers would take
    cached: int  # bytes that layers share, from the start or from the first microbatch on, as ALiBi's biases


# Whether any rank of a run would wait for ever: calls are matched group by group, and replayed in strict program order.
#
# A collective waits where it is issued until every rank of its group has issued it, also if it is asynchronous.
# Messages posted as one batch wait for all their partners, who must post theirs in batches too: with NCCL they take the
# group's communicator. Any other message takes one of its two ranks alone, whose stream holds what either posts, in
# order and in both directions: a send meets a receive there, or neither ends. It waits where the program waits for it.
# Whoever is slower than this in a real run only waits later.

_OF_ONE_COLLECTIVE = attrgetter("operation", "shapes", "dtype", "peer")  # the same for all of its calls
_OF_ONE_MESSAGE = attrgetter("shapes", "dtype")


def check_order(programs: Mapping[int, Iterable[Entry]], whole_runs: bool = False) -> str | None:
    """The first problem of these programs, which must be those of all ranks of every group in them; None: all end.

    It names both ranks that do not fit together, and their calls; or one that reads too early. `programs` are by global
    rank. `whole_runs` end with the run, and by then all calls were waited for; a schedule leaves sends to themselves.
    """
    try:
        _Replay(programs, whole_runs).run()
    except _Found as problem:
        return str(problem)
    return None


@dataclass(slots=True, eq=False)
class _Place:
    """A call of a rank, and its number among the rank's calls."""

    rank: int
    number: int
    call: Call
    phase: str = ""  # of a run, if it is marked
    is_met: bool = False  # by all that it waits for

    @property
    def members(self) -> Sequence[Any]:
        """The ranks that take part; of a message who sends it, and who receives it."""
        call = self.call
        if call.operation not in MESSAGES:
            return call.group
        return (self.rank, call.peer) if call.operation == "send" else (call.peer, self.rank)

    @property
    def channel(self) -> Any:
        """Those of one channel meet in their order: batches of messages have one for each direction."""
        call, is_message = self.call, self.call.operation in MESSAGES
        is_alone = is_message and call.batch is None
        return call.axis, call.group, is_message, frozenset(self.members) if is_alone else self.members

    def __str__(self) -> str:
        call = self.call
        shapes = " and ".join(str(list(shape)) for shape in call.shapes[:2]) + (" ..." if len(call.shapes) > 2 else "")
        side = "to" if call.operation == "send" else "from"
        peer = "" if call.peer is None else f" {side} rank {call.peer}"
        of = f" of {call.dtype} {shapes}" if call.shapes else ""
        during = f" ({self.phase})" if self.phase else ""
        return f"call {self.number} of rank {self.rank}{during}, {call.operation}{of}{peer} in group {call.axis}"


class _Found(Exception):
    """Ends a replay, and says why."""


class _Replay:
    """Runs every rank as far as it comes, until all have ended or none moves. Raises `_Found`."""

    def __init__(self, programs: Mapping[int, Iterable[Entry]], whole_runs: bool) -> None:
        self.programs, self.whole_runs = programs, whole_runs
        self.waits_for: dict[int, list[_Place]] = {rank: [] for rank in programs}
        self.ready = deque(programs)
        # Of each channel what not all of its members have joined, in order: who has come.
        self.begun: dict[Any, list[dict[int, _Place]]] = defaultdict(list)

    def run(self) -> None:
        running = {rank: self._waits(rank, entries) for rank, entries in self.programs.items()}
        while self.ready:
            rank = self.ready.popleft()
            for places in running[rank]:  # goes on where it stopped
                self.waits_for[rank] = [place for place in places if not place.is_met]
                if self.waits_for[rank]:
                    break
        if stuck := [rank for rank, places in self.waits_for.items() if places]:
            self._tell_why(stuck[0])
        for place in (place for begun in self.begun.values() for came in begun for place in came.values()):
            raise _Found(f"{place} has no partner on rank {place.call.peer}.")  # a message that nobody takes

    def _waits(self, rank: int, entries: Iterable[Entry]) -> Iterator[Sequence[_Place]]:
        """Issues a rank's calls, and gives what it waits for wherever it does: for a collective where it is issued."""
        num_calls, phase = 0, ""
        under_way: dict[Any, _Place] = {}  # by handle: what the program still waits for
        batch: list[_Place] = []
        for entry in entries:
            if isinstance(entry, Mark) and entry.phase in PHASES:
                phase = entry.phase
            elif isinstance(entry, EarlyUse):
                raise _Found(f"{under_way[entry.handle]}: its result is used before it is waited for.")
            if not isinstance(entry, Call | Wait):
                continue
            if batch and (isinstance(entry, Wait) or entry.batch != batch[0].call.batch):
                yield batch
                batch = []
            if isinstance(entry, Wait):
                yield [under_way.pop(entry.handle)] if entry.handle in under_way else []
                continue
            place = _Place(rank, num_calls, entry, phase)
            num_calls += 1
            self._issue(place)
            if entry.is_async:
                under_way[entry.handle] = place
            if entry.batch is not None:
                batch.append(place)
            elif entry.operation not in MESSAGES or not entry.is_async:
                yield [place]
        yield batch
        for place in under_way.values():
            if self.whole_runs and place.call.operation != "send":
                raise _Found(f"{place}: nobody waits for it.")

    def _issue(self, place: _Place) -> None:
        begun, call, is_message = self.begun[place.channel], place.call, place.call.operation in MESSAGES
        came = next((places for places in begun if place.rank not in places), None)
        if came is None:
            begun.append(came := {})
        other = next(iter(came.values()), None)
        if other is not None and is_message and call.operation == other.call.operation:
            deadlock = f"{other} waits for rank {place.rank}; {place} waits for rank {other.rank}."
            raise _Found(f"ranks wait for one another: {deadlock}")
        meaning = _OF_ONE_MESSAGE if is_message else _OF_ONE_COLLECTIVE
        if other is not None and meaning(call) != meaning(other.call):
            raise _Found(f"{other} meets {place}.")
        came[place.rank] = place
        if len(came) < len(place.members):
            return
        begun.remove(came)
        for place in came.values():
            place.is_met = True
            waits_for = self.waits_for[place.rank]
            if place in waits_for:
                waits_for.remove(place)
                if not waits_for:
                    self.ready.append(place.rank)

    def _tell_why(self, rank: int) -> NoReturn:
        """A cycle of ranks, or one that waits for a rank that has ended."""
        seen: dict[int, str] = {}  # why each waits
        while rank not in seen:
            place = self.waits_for[rank][0]
            came = next(places for places in self.begun[place.channel] if place in places.values())
            missing = [other for other in place.members if other not in came]
            ended = [other for other in missing if not self.waits_for.get(other)]
            if ended:
                raise _Found(f"{place} waits for rank {ended[0]}, which ends without such a call.")
            seen[rank] = f"{place} waits for rank {missing[0]}"
            rank = missing[0]
        cycle = [*seen.values()][[*seen].index(rank) :]
        raise _Found(f"ranks wait for one another: {'; '.join(cycle)}.")
