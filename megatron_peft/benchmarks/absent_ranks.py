"""A world of which a few ranks run, each in a process: what the others give to a gather is made from what these give.

The running ranks have torch's fake process group of the whole world, so that nothing they send arrives, and all of
their code is the real one. Only collectives of objects are answered. An absent rank gives the pickle of a running rank
in which each number, also within a text, is as far from that rank's as it is between two running neighbours: `__7_0`
follows from `__1_0` and `__2_0`, the rows of a slice from those of the slice beside it. torch itself takes the pickles
apart, so that a gather costs what it costs.
"""

import os
import pickle
import pickletools
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from itertools import product
from operator import sub
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from megatron_peft.benchmarks.measure import Meter
from megatron_peft.runtime.fake_ranks import fake_world, replaced

Place = tuple[int, ...]
# Of each axis the ranks that are like no other, and the one that all further ranks are like, but for numbers.
ANCHORS: tuple[Place, ...] = ((0, 1), (0, 1), (0,))
MESH_EXTRA = 3  # descriptors of a gloo group beside one for each rank, counted on groups of up to 64


class Grid(NamedTuple):
    """Sizes of the axes, in megatron-core's order of ranks."""

    tensor: int
    data: int
    pipeline: int

    @property
    def world_size(self) -> int:
        return self.tensor * self.data * self.pipeline

    def place(self, rank: int) -> Place:
        return rank % self.tensor, rank // self.tensor % self.data, rank // self.tensor // self.data

    def rank(self, place: Sequence[int]) -> int:
        return place[0] + self.tensor * (place[1] + self.data * place[2])

    def next_on(self, axis: int, rank: int) -> int | None:
        """The neighbour, if there is one."""
        place = [*self.place(rank)]
        place[axis] += 1
        return self.rank(place) if place[axis] < self[axis] else None

    def anchor(self, rank: int) -> int:
        """The rank that this one is like."""
        return self.rank([min(at, own[-1]) for at, own in zip(self.place(rank), ANCHORS, strict=True)])

    def running(self) -> list[int]:
        """The anchors, and the neighbours of those that others are like."""
        anchors = {self.anchor(self.rank(place)) for place in product(*map(range, self)) if max(place) < 2}
        steps = [(rank, axis) for rank in anchors for axis in range(3) if self.place(rank)[axis] == ANCHORS[axis][-1]]
        return sorted(anchors | {at for rank, axis in steps if (at := self.next_on(axis, rank)) is not None})


class MovedPickle:
    """A running rank's pickle, to be moved along the axes on which the pickle of its neighbour is known."""

    def __init__(self, own: bytes, neighbours: Mapping[int, bytes]) -> None:
        operations = _operations(own)
        others = {axis: _operations(data) for axis, data in neighbours.items()}
        kinds = [kind for kind, *_ in operations]
        alike = {axis: found for axis, found in others.items() if [kind for kind, *_ in found] == kinds}
        texts: list[list[bytes]] = [[]]
        self._varying: list[tuple[Any, dict[int, Any]]] = []  # a value, and the neighbours' in its place
        for number, (kind, value, code) in enumerate(operations):
            near = {axis: found[number][1] for axis, found in alike.items() if found[number][1] != value}
            if kind in ("int", "str", "bytes") and near:
                self._varying.append((value, near))
                texts.append([])
            else:
                texts[-1].append(code)
        self._first, *self._fixed = map(b"".join, texts)
        self.axes = {axis for _, near in self._varying for axis in near}  # on which it moves at all

    def at(self, steps: Mapping[int, int]) -> bytes:
        """The pickle so many steps away, by axis."""
        written = [self._first]
        for (value, near), fixed in zip(self._varying, self._fixed, strict=True):
            far = [(near[axis], count) for axis, count in steps.items() if axis in near]
            written += [_operation(_moved(value, far)), fixed]
        return b"".join(written)


def _operations(data: bytes) -> list[tuple[str, Any, bytes]]:
    """(kind, value, code) of each operation of a pickle; its frames, which have lengths, are left out."""
    found = [*pickletools.genops(data)]
    ends = [*(begin for *_, begin in found[1:]), len(data)]
    named = [("int" if "INT" in one.name or one.name == "LONG1" else one.name, one, *more) for one, *more in found]
    kinds = [re.sub(".*UNICODE.*", "str", re.sub(".*BINBYTES.*", "bytes", name)) for name, *_ in named]
    return [
        (kind, value, data[begin:end])
        for kind, (_, _, value, begin), end in zip(kinds, named, ends, strict=True)
        if kind != "FRAME"
    ]


def _operation(value: Any) -> bytes:
    if isinstance(value, int):
        return pickle.dumps(value, 2)[2:-1]
    code, data = (b"B", value) if isinstance(value, bytes) else (b"X", value.encode())
    return code + len(data).to_bytes(4, "little") + data


def _moved(own: Any, far: Sequence[tuple[Any, int]]) -> Any:
    """A value moved as far as it is to each of these, so many times."""
    if isinstance(own, int):
        return own + sum(count * (near - own) for near, count in far)
    if isinstance(own, bytes):  # an array of int64; others do not differ
        array = np.frombuffer(own, np.int64)
        return (array + sum(count * (np.frombuffer(near, np.int64) - array) for near, count in far)).tobytes()
    texts, *others = ([*re.split(r"(\d+)", text)] for text in (own, *(near for near, _ in far)))
    if any(other[::2] != texts[::2] for other in others) or re.fullmatch("[0-9a-f]{8}", own):
        return own  # no number of a rank: a random name, a checksum
    counts = [count for _, count in far]
    for at in range(1, len(texts), 2):
        number = _moved(int(texts[at]), [(int(other[at]), count) for other, count in zip(others, counts, strict=True)])
        texts[at] = str(number).zfill(len(texts[at]))
    return "".join(texts)


class AbsentRanks:
    """Answers the collectives of objects of a running rank.

    store: of the running ranks alone; is_measured: whether torch takes the answers apart, or this rank only goes along.
    """

    def __init__(self, grid: Grid, running: Sequence[int], rank: int, store: Any, meter: Meter, is_measured: bool):
        self.grid, self.running, self.rank = grid, running, rank
        self.store, self.meter, self.is_measured = store, meter, is_measured
        self._num_calls = Counter[str]()
        self._answers: list[bytes] = []  # of the gather that is under way, by rank of the group

    @contextmanager
    def world(self) -> Iterator[None]:
        """The fake world of this rank."""
        with fake_world(self.rank, self.grid.world_size), ExitStack() as stack:
            self._usual = {name: getattr(dist, name) for name in (*Meter.COLLECTIVES, "new_group")}
            for name in self._usual:
                stack.enter_context(replaced(dist, name, getattr(self, f"_{name}")))
            for name in ("all_gather", "gather"):
                stack.enter_context(replaced(distributed_c10d, name, self._fill))
            yield

    def _new_group(self, ranks: Any = None, *args: Any, backend: Any = None, **kwargs: Any) -> Any:
        members = range(self.grid.world_size) if ranks is None else ranks
        if not self.is_measured and self.rank not in members:
            return dist.GroupMember.NON_GROUP_MEMBER
        if backend == "gloo":
            self.meter.meshes += len(members) + MESH_EXTRA
        return self._usual["new_group"](ranks, *args, **kwargs)

    def _all_gather_object(self, object_list: list[Any], obj: Any, group: Any = None) -> None:
        with self.meter.aside():
            self._answers = self._of_group(obj, group)
            self._create_files(group)
        if self.is_measured:
            self._usual["all_gather_object"](object_list, obj, group)
            return
        found = {data: pickle.loads(data) for data in {*self._answers}}
        object_list[:] = [found[data] for data in self._answers]

    def _gather_object(
        self, obj: Any, object_gather_list: Any = None, dst: Any = None, group: Any = None, group_dst: Any = None
    ) -> None:
        if object_gather_list is None:
            self._exchange(pickle.dumps(obj), group)
        else:
            with self.meter.aside():
                self._answers = self._of_group(obj, group)
            self._usual["gather_object"](obj, object_gather_list, group=group, group_dst=dist.get_rank(group))
        with self.meter.aside():
            self._create_files(group)

    def _broadcast_object_list(
        self, object_list: list[Any], src: Any = None, group: Any = None, device: Any = None, group_src: Any = None
    ) -> None:
        source = self._source(src, group, group_src)
        given = self._exchange(pickle.dumps(object_list if self.rank == source else None), group)
        if self.rank != source and source in given:
            object_list[:] = pickle.loads(given[source])

    def _scatter_object_list(
        self,
        scatter_object_output_list: list[Any],
        scatter_object_input_list: Any = None,
        src: Any = None,
        group: Any = None,
        group_src: Any = None,
    ) -> None:
        source, own = self._source(src, group, group_src), None
        if self.rank == source:
            pickles = zip(self._members(group), map(pickle.dumps, scatter_object_input_list), strict=True)  # as torch
            own = {rank: data for rank, data in pickles if rank in self.running}
        given = pickle.loads(self._exchange(pickle.dumps(own), group)[source])
        scatter_object_output_list[0] = pickle.loads(given[self.rank])

    @staticmethod
    def _source(src: int | None, group: Any, group_src: int | None) -> int:
        if group_src is None or group is None:
            return src or group_src or 0
        return dist.get_global_rank(group, group_src)

    def _fill(self, tensor: Any, outputs: Any = None, **_: Any) -> None:
        """In place of torch's gathers of tensors, as it calls them for objects: of the sizes, then of the pickles."""
        outputs = tensor if isinstance(tensor, list) else outputs or _["gather_list"]
        with self.meter.aside():
            for output, data in zip(outputs, self._answers, strict=True):
                if output.dtype == torch.int64:
                    output.fill_(len(data))
                else:
                    output[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)

    def _members(self, group: Any) -> Sequence[int]:
        return range(self.grid.world_size) if group is None else dist.get_process_group_ranks(group)

    def _exchange(self, data: bytes, group: Any) -> dict[int, bytes]:
        """What each running rank of the group gives."""
        with self.meter.aside():
            members = self._members(group)
            name = f"{members[0]}-{members[-1]}-{len(members)}"
            self._num_calls[name] += 1
            call = f"{name}/{self._num_calls[name]}"
            self.store.set(f"{call}/{self.rank}", data)
            return {rank: self.store.get(f"{call}/{rank}") for rank in self.running if rank in members}

    def _of_group(self, value: Any, group: Any) -> list[bytes]:
        """The pickle of each rank of a group."""
        given = self._exchange(pickle.dumps(sorted(value) if isinstance(value, set) else value), group)
        moved, members = self._moved(given), self._members(group)
        same, *others = {*given.values()}
        answers = (
            [given[rank] if rank in given else moved(rank) for rank in members] if others else [same] * len(members)
        )
        if isinstance(value, set):  # whose pickle has no order
            sets = {data: pickle.dumps({*pickle.loads(data)}) for data in {*answers}}
            answers = [sets[data] for data in answers]
        return answers

    def _create_files(self, group: Any) -> None:
        """The files that absent ranks have created since the last gather are those of the running, by other names."""
        if len(self._members(group)) < self.grid.world_size:
            return
        created, self.meter.created = self.meter.created, []
        given = self._exchange(pickle.dumps(created), None)
        if self.rank != 0 or not any(map(pickle.loads, given.values())):
            return
        moved = self._moved(given)
        for rank in range(self.grid.world_size):
            own = given[self._anchor(rank, given)]
            if rank not in given and (other := moved(rank)) != own:
                for path, name in zip(pickle.loads(own), pickle.loads(other), strict=True):
                    with suppress(OSError):  # it is gone, or a file of several ranks
                        os.link(path, name)

    def _anchor(self, rank: int, given: Mapping[int, bytes]) -> int:
        """The rank that an absent one is like; of a group, or where that does not run, the first."""
        anchor = self.grid.anchor(rank)
        return anchor if anchor in given else min(given)

    def _moved(self, given: Mapping[int, bytes]) -> Callable[[int], bytes]:
        """From an absent rank to its pickle."""

        @cache
        def of_anchor(anchor: int) -> MovedPickle:
            near = {axis: self.grid.next_on(axis, anchor) for axis in range(3)}
            known = {axis: given[rank] for axis, rank in near.items() if rank is not None and rank in given}
            return MovedPickle(given[anchor], known)

        @cache
        def at(anchor: int, steps: tuple[tuple[int, int], ...]) -> bytes:
            return of_anchor(anchor).at(dict(steps))

        def of(rank: int) -> bytes:
            anchor = self._anchor(rank, given)
            steps = enumerate(map(sub, self.grid.place(rank), self.grid.place(anchor)))
            return at(anchor, tuple((axis, count) for axis, count in steps if axis in of_anchor(anchor).axes))

        return of
