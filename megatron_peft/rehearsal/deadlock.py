"""Whether any rank of a run would wait for ever: calls matched group by group, and replayed in strict program order.

A collective waits where it is issued until every rank of its group has issued it, also if it is asynchronous. Messages
posted as one batch wait for all their partners, who must post theirs in batches too: with NCCL they take the group's
communicator. Any other message takes one of its two ranks alone, whose stream holds what either posts, in order and in
both directions: a send meets a receive there, or neither ends. It waits where the program waits for it. Whoever is
slower than this in a real run only waits later.
"""

from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_peft.rehearsal.record import MESSAGES, PHASES, Call, EarlyUse, Entry, Mark, Wait


@dataclass(frozen=True)
class Problem:
    """Two ranks that do not fit together, in a sentence that names both and their calls; or one that reads too early.

    Args:
        kind: "mismatch"; "wait" for one that does not end, or for one that is missing.
    """

    kind: str
    ranks: tuple[int, ...]
    text: str


def check_order(programs: Mapping[int, Iterable[Entry]]) -> Problem | None:
    """The first problem of these programs, which must be those of all ranks of every group in them; None: all end.

    Args:
        programs: by global rank; what is computed does not matter.
    """
    return _Replay(programs).run()


def missing_wait(programs: Mapping[int, Iterable[Entry]]) -> Problem | None:
    """The first asynchronous call whose result is used, or left at the end, without a wait; None: there is none.

    A schedule leaves sends to themselves.

    Args:
        programs: as for `check_order`, each of a whole run.
    """
    for rank, entries in programs.items():
        calls: list[_Place] = []
        under_way: dict[int, _Place] = {}
        for entry, phase in _with_phases(entries):
            if isinstance(entry, Call):
                calls.append(_Place(rank, len(calls), entry, phase))
                if entry.is_async and entry.operation != "send":
                    under_way[len(calls) - 1] = calls[-1]
            elif isinstance(entry, Wait):
                under_way.pop(entry.call, None)
            elif isinstance(entry, EarlyUse):
                return Problem("wait", (rank,), f"{calls[entry.call]}: its result is used before it is waited for.")
        for place in under_way.values():
            return Problem("wait", (rank,), f"{place}: nobody waits for it.")
    return None


def _with_phases(entries: Iterable[Entry]) -> Iterator[tuple[Entry, str]]:
    """Each entry, and the phase of a run that it is in; empty if that is not marked."""
    phase = ""
    for entry in entries:
        if isinstance(entry, Mark) and entry.phase in PHASES:
            phase = entry.phase
        yield entry, phase


@dataclass(slots=True)
class _Place:
    """A call of a rank, and its number among the rank's calls.

    Args:
        phase: of a run, if it is marked.
        is_met: by all that it waits for.
    """

    rank: int
    number: int
    call: Call
    phase: str = ""
    is_met: bool = False

    def __str__(self) -> str:
        call = self.call
        shapes = " and ".join(str(list(shape)) for shape in call.shapes[:2]) + (" ..." if len(call.shapes) > 2 else "")
        peer = "" if call.peer is None else f" {'from' if call.operation == 'recv' else 'to'} rank {call.peer}"
        if call.operation not in MESSAGES and call.peer is not None:
            peer = f" from rank {call.peer}"
        of = f" of {call.dtype} {shapes}" if call.shapes else ""
        during = f" ({self.phase})" if self.phase else ""
        return f"call {self.number} of rank {self.rank}{during}, {call.operation}{of}{peer} in group {call.axis}"


@dataclass(slots=True)
class _Post:
    """Calls that are issued together."""

    places: list[_Place]
    blocks: bool


@dataclass(slots=True)
class _WaitFor:
    """A message that must have its partner."""

    place: _Place


@dataclass
class _Rank:
    """What is left of a program, and what it waits for."""

    number: int
    nodes: Iterator[_Post | _WaitFor]
    waits_for: list[_Place] = field(default_factory=list)


def _nodes(rank: int, entries: Iterable[Entry]) -> Iterator[_Post | _WaitFor]:
    """Posts and waits. Of collectives the wait is where they are issued."""
    num_calls = 0
    messages: dict[int, _Place] = {}  # by number: those that the program still waits for
    batch: list[_Place] = []
    for entry, phase in _with_phases(entries):
        if isinstance(entry, Call):
            place = _Place(rank, num_calls, entry, phase)
            num_calls += 1
            if batch and entry.batch != batch[0].call.batch:
                yield _Post(batch, blocks=True)
                batch = []
            if entry.batch is not None:
                batch.append(place)
                continue
            is_async_message = entry.operation in MESSAGES and entry.is_async
            if is_async_message:
                messages[place.number] = place
            yield _Post([place], blocks=not is_async_message)
        elif isinstance(entry, Wait):
            if batch:
                yield _Post(batch, blocks=True)
                batch = []
            waited_for = messages.pop(entry.call, None)
            if waited_for is not None:
                yield _WaitFor(waited_for)
    if batch:
        yield _Post(batch, blocks=True)


class _Replay:
    """Runs every rank as far as it comes, until all have ended or none moves."""

    def __init__(self, programs: Mapping[int, Iterable[Entry]]) -> None:
        self.ranks = {rank: _Rank(rank, _nodes(rank, entries)) for rank, entries in programs.items()}
        # Of each group, its collectives by number that not all have joined: who has come.
        self.collectives: dict[Any, dict[int, dict[int, _Place]]] = defaultdict(dict)
        self.counts: dict[Any, int] = defaultdict(int)  # of each group and rank: collectives issued
        # Messages without a partner, all of one rank: of a group's batches from one rank to another; of others between
        # two ranks of a group.
        self.messages: dict[Any, deque[_Place]] = defaultdict(deque)
        self.waiting: dict[int, list[_Rank]] = defaultdict(list)  # by id of the place

    def run(self) -> Problem | None:
        ready = deque(self.ranks.values())
        while ready:
            rank = ready.popleft()
            for node in rank.nodes:  # goes on where it stopped
                problem, blocked = self._step(rank, node, ready)
                if problem:
                    return problem
                if blocked:
                    break
        stuck = [rank for rank in self.ranks.values() if rank.waits_for]
        return self._why(stuck) if stuck else self._left_over()

    def _step(self, rank: _Rank, node: _Post | _WaitFor, ready: deque[_Rank]) -> tuple[Problem | None, bool]:
        if isinstance(node, _WaitFor):
            rank.waits_for = [] if node.place.is_met else [node.place]
        else:
            for place in node.places:
                problem = self._issue(place, ready)
                if problem:
                    return problem, True
            rank.waits_for = [place for place in node.places if not place.is_met] if node.blocks else []
        for place in rank.waits_for:
            self.waiting[id(place)].append(rank)
        return None, bool(rank.waits_for)

    def _issue(self, place: _Place, ready: deque[_Rank]) -> Problem | None:
        call = place.call
        if call.operation in MESSAGES:
            return self._message(place, ready)
        group = (call.axis, call.group)
        number = self.counts[group, place.rank]
        self.counts[group, place.rank] += 1
        others = self.collectives[group].setdefault(number, {})
        if others:
            other = next(iter(others.values()))
            if _differ(call, other.call):
                return Problem("mismatch", (other.rank, place.rank), f"{other} meets {place}.")
        others[place.rank] = place
        if len(others) == len(call.group):
            for one in self.collectives[group].pop(number).values():
                self._complete(one, ready)
        return None

    def _message(self, place: _Place, ready: deque[_Rank]) -> Problem | None:
        call = place.call
        ends: Any = frozenset((place.rank, call.peer))
        if call.batch is not None:
            ends = (place.rank, call.peer) if call.operation == "send" else (call.peer, place.rank)
        queue = self.messages[call.axis, call.group, ends]
        if not queue or queue[0].rank == place.rank:
            queue.append(place)
            return None
        other = queue.popleft()
        if call.operation == other.call.operation:
            told = f"{other} waits for rank {place.rank}; {place} waits for rank {other.rank}."
            return Problem("wait", (other.rank, place.rank), f"ranks wait for one another: {told}")
        if (call.shapes, call.dtype) != (other.call.shapes, other.call.dtype):
            return Problem("mismatch", (other.rank, place.rank), f"{other} meets {place}.")
        self._complete(place, ready)
        self._complete(other, ready)
        return None

    def _complete(self, place: _Place, ready: deque[_Rank]) -> None:
        place.is_met = True
        for rank in self.waiting.pop(id(place), ()):
            rank.waits_for = [one for one in rank.waits_for if one is not place]
            if not rank.waits_for:
                ready.append(rank)

    def _why(self, stuck: list[_Rank]) -> Problem:
        """A cycle of ranks, or one that waits for a rank that has ended."""
        rank, seen = stuck[0], []
        while rank not in seen:
            seen.append(rank)
            place = rank.waits_for[0]
            missing = self._missing(place)
            ended = [other for other in missing if other not in self.ranks or not self.ranks[other].waits_for]
            if ended:
                ranks = (rank.number, ended[0])
                return Problem("wait", ranks, f"{place} waits for rank {ended[0]}, which ends without such a call.")
            rank = self.ranks[missing[0]]
        cycle = seen[seen.index(rank) :]
        told = "; ".join(f"{one.waits_for[0]} waits for rank {self._missing(one.waits_for[0])[0]}" for one in cycle)
        return Problem("wait", tuple(one.number for one in cycle), f"ranks wait for one another: {told}.")

    def _missing(self, place: _Place) -> list[int]:
        call = place.call
        if call.operation in MESSAGES:
            return [call.peer if call.peer is not None else -1]
        for others in self.collectives[call.axis, call.group].values():
            if others.get(place.rank) is place:
                return [rank for rank in call.group if rank not in others]
        return []

    def _left_over(self) -> Problem | None:
        """Messages that nobody takes."""
        for queue in self.messages.values():
            for place in queue:
                peer = place.call.peer if place.call.peer is not None else -1
                return Problem("wait", (place.rank, peer), f"{place} has no partner on rank {peer}.")
        return None


def _differ(one: Call, other: Call) -> bool:
    """Whether two calls cannot be one collective."""
    return (one.operation, one.shapes, one.dtype, one.peer) != (other.operation, other.shapes, other.dtype, other.peer)
