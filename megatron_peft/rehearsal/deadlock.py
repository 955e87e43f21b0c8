"""Whether any rank of a run would wait for ever: calls matched group by group, and replayed in strict program order.

A collective waits where it is issued until every rank of its group has issued it, also if it is asynchronous. Messages
posted as one batch wait for all their partners, who must post theirs in batches too: with NCCL they take the group's
communicator. Any other message takes one of its two ranks alone, whose stream holds what either posts, in order and in
both directions: a send meets a receive there, or neither ends. It waits where the program waits for it. Whoever is
slower than this in a real run only waits later.
"""

from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, NoReturn

from megatron_peft.rehearsal.program import MESSAGES, PHASES, Call, EarlyUse, Entry, Mark, Wait

_OF_ONE_COLLECTIVE = attrgetter("operation", "shapes", "dtype", "peer")  # the same for all of its calls


def check_order(programs: Mapping[int, Iterable[Entry]], whole_runs: bool = False) -> str | None:
    """The first problem of these programs, which must be those of all ranks of every group in them; None: all end.

    It names both ranks that do not fit together, and their calls; or one that reads too early.

    Args:
        programs: by global rank; what is computed does not matter.
        whole_runs: they end with the run, and by then all calls were waited for; a schedule leaves sends to themselves.
    """
    try:
        _Replay(programs, whole_runs).run()
    except _Found as found:
        return str(found)
    return None


@dataclass(slots=True, eq=False)
class _Place:
    """A call of a rank, and its number among the rank's calls."""

    rank: int
    number: int
    call: Call
    phase: str = ""  # of a run, if it is marked
    is_met: bool = False  # by all that it waits for

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
        # Of each group, its collectives that not all have joined, in their order: who has come.
        self.collectives: dict[Any, list[dict[int, _Place]]] = defaultdict(list)
        # Messages without a partner, all of one rank: of a group's batches from one rank to another; of others between
        # two ranks of a group.
        self.messages: dict[Any, deque[_Place]] = defaultdict(deque)

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
        for place in (place for queue in self.messages.values() for place in queue):  # that nobody takes
            raise _Found(f"{place} has no partner on rank {place.call.peer}.")

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
        call = place.call
        if call.operation in MESSAGES:
            return self._message(place)
        begun = self.collectives[call.axis, call.group]
        others = next((one for one in begun if place.rank not in one), None)
        if others is None:
            begun.append(others := {})
        other = next(iter(others.values()), place)
        if _OF_ONE_COLLECTIVE(call) != _OF_ONE_COLLECTIVE(other.call):
            raise _Found(f"{other} meets {place}.")
        others[place.rank] = place
        if len(others) == len(call.group):
            begun.remove(others)
            self._complete(*others.values())

    def _message(self, place: _Place) -> None:
        call = place.call
        ends: Any = frozenset((place.rank, call.peer))
        if call.batch is not None:
            ends = (place.rank, call.peer) if call.operation == "send" else (call.peer, place.rank)
        queue = self.messages[call.axis, call.group, ends]
        if not queue or queue[0].rank == place.rank:
            queue.append(place)
            return
        other = queue.popleft()
        if call.operation == other.call.operation:
            told = f"{other} waits for rank {place.rank}; {place} waits for rank {other.rank}."
            raise _Found(f"ranks wait for one another: {told}")
        if (call.shapes, call.dtype) != (other.call.shapes, other.call.dtype):
            raise _Found(f"{other} meets {place}.")
        self._complete(place, other)

    def _complete(self, *places: _Place) -> None:
        for place in places:
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
            call = place.call
            missing: list[Any] = [call.peer]
            if call.operation not in MESSAGES:
                came = next(one for one in self.collectives[call.axis, call.group] if place in one.values())
                missing = [other for other in call.group if other not in came]
            ended = [other for other in missing if not self.waits_for.get(other)]
            if ended:
                raise _Found(f"{place} waits for rank {ended[0]}, which ends without such a call.")
            seen[rank] = f"{place} waits for rank {missing[0]}"
            rank = missing[0]
        cycle = [*seen.values()][[*seen].index(rank) :]
        raise _Found(f"ranks wait for one another: {'; '.join(cycle)}.")
