"""A world of which a few ranks run, each in a process: what the others give to a gather is made from what these give.

The running ranks have torch's fake process group of the whole world: nothing that they send arrives, and all of their
code is the real one. Only collectives of objects are answered. An absent rank gives what a running one gives, with each
number, also within a text, as far away as it is between two running neighbours: `__7_0` follows from `__1_0` and
`__2_0`, the rows of a slice from those of the slice beside it. torch itself takes the pickles apart, at its own cost.
"""

import os
import pickle
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from megatron_peft.benchmarks.measure import Meter
from megatron_peft.runtime import launch
from megatron_peft.runtime.fake_ranks import fake_world, replaced

MOST_BYTES = 1 << 22  # of a value in a store
MESH_EXTRA = 3  # descriptors of a gloo group beside one for each rank, counted on groups of up to 64


class Grid(NamedTuple):
    """Sizes of the axes, in megatron-core's order of ranks."""

    tensor: int
    data: int
    pipeline: int

    @property
    def world_size(self) -> int:
        return self.tensor * self.data * self.pipeline

    def place(self, rank: int) -> tuple[int, ...]:
        return rank % self.tensor, rank // self.tensor % self.data, rank // self.tensor // self.data

    def anchor(self, rank: int) -> int:
        """The rank that this one is like, but for numbers; the first slice and the first replica are like no other."""
        tensor, data, _ = self.place(rank)
        return min(tensor, 1) + self.tensor * min(data, 1)

    def neighbours(self, rank: int) -> dict[int, int]:
        """The next rank on each axis that has one."""
        steps = enumerate((1, self.tensor, self.tensor * self.data))
        return {axis: rank + step for axis, step in steps if self.place(rank)[axis] + 1 < self[axis]}

    def running(self) -> tuple[int, ...]:
        """The anchors of all ranks, and their neighbours."""
        anchors = {self.anchor(rank) for rank in range(self.world_size)}
        return tuple(sorted(anchors.union(*(self.neighbours(rank).values() for rank in anchors))))


class Moved:
    """What a running rank gives, to be moved along axes on which its neighbours are known; all as pickles of text."""

    def __init__(self, own: bytes, neighbours: Mapping[int, bytes]) -> None:
        self._lines = own.split(b"\n")
        alike = {
            axis: lines for axis, text in neighbours.items() if len(lines := text.split(b"\n")) == len(self._lines)
        }
        self._near = {
            axis: {at: line for at, line in enumerate(lines) if line != self._lines[at]}
            for axis, lines in alike.items()
        }
        self.axes = {axis for axis, changed in self._near.items() if changed}  # on which it moves at all

    def at(self, steps: Mapping[int, int]) -> Any:
        """The value so many steps away, by axis."""
        lines = [*self._lines]
        near = [(self._near.get(axis, {}), count) for axis, count in steps.items()]
        for at in {at for changed, _ in near for at in changed}:
            lines[at] = _moved(lines[at], [(changed[at], count) for changed, count in near if at in changed])
        return pickle.loads(b"\n".join(lines))


def _moved(own: bytes, far: Sequence[tuple[bytes, int]]) -> bytes:
    """A line, moved as far as it is to each of these, so many times."""
    if b"\\u0000" in own:  # an array, of int64
        begin = own.index(b"V")
        data = [pickle.loads(line[begin:] + b"\n.").encode("latin1") for line in (own, *(near for near, _ in far))]
        if {len(buffer) % 8 for buffer in data} != {0} or len({*map(len, data)}) > 1:
            return own
        array, *near = (np.frombuffer(buffer, np.int64) for buffer in data)
        array = array + sum(count * (other - array) for other, (_, count) in zip(near, far, strict=True))
        return own[:begin] + pickle.dumps(array.tobytes().decode("latin1"), 0).split(b"\n")[0]
    texts, *others = ([*re.split(rb"(\d+)", line)] for line in (own, *(near for near, _ in far)))
    if any(other[::2] != texts[::2] for other in others) or re.fullmatch(rb"\W*V[0-9a-f]{8}", own):
        return own  # no number of a rank: a random name, a checksum
    for at in range(1, len(texts), 2):
        number = int(texts[at])
        number += sum(count * (int(other[at]) - number) for other, (_, count) in zip(others, far, strict=True))
        texts[at] = str(number).zfill(len(texts[at]) if texts[at].startswith(b"0") else 0).encode()
    return b"".join(texts)


class AbsentRanks(Meter):
    """The fake world of a running rank, as a context manager that counts.

    store: of the running ranks alone; is_measured: whether torch takes the answers apart, or this rank only goes along.
    """

    def __init__(self, grid: Grid, running: Sequence[int], rank: int, store: Any, is_measured: bool) -> None:
        super().__init__()
        self.grid, self.running, self.rank, self.store, self.is_measured = grid, running, rank, store, is_measured
        self._num_calls = Counter[str]()
        self._answers: Sequence[bytes] = ()  # of the gather that is under way, by rank of the group

    def __enter__(self) -> "AbsentRanks":
        self.enter_context(fake_world(self.rank, self.grid.world_size))
        super().__enter__()
        self.enter_context(replaced(dist, "new_group", partial(self._new_group, dist.new_group)))
        self.enter_context(replaced(launch, "is_on_any", self._is_on_any))
        for name in ("all_gather", "gather"):
            self.enter_context(replaced(distributed_c10d, name, self._fill))
        return self

    def _new_group(self, usual: Any, ranks: Any = None, *args: Any, backend: Any = None, **kwargs: Any) -> Any:
        members = range(self.grid.world_size) if ranks is None else ranks
        if not self.is_measured and self.rank not in members:
            return dist.GroupMember.NON_GROUP_MEMBER
        self.meshes += (len(members) + MESH_EXTRA) * (backend == "gloo")
        return usual(ranks, *args, **kwargs)

    def _is_on_any(self, own: bool) -> bool:
        """What a maximum would tell; and no rank goes on before the others are there."""
        return any(map(pickle.loads, self._exchange(pickle.dumps(own), None).values()))

    def answer(self, usual: Callable[..., Any], given: dict[str, Any]) -> None:
        group, source = given.get("group"), given.get("src") or 0
        if "object_list" in given and "obj" not in given:  # a broadcast
            sent = self._exchange(pickle.dumps(given["object_list"] if self.rank == source else None), group)
            given["object_list"][:] = given["object_list"] if self.rank == source else pickle.loads(sent[source])
        elif "obj" not in given:  # a scatter
            own = zip(self._members(group), map(pickle.dumps, given["scatter_object_input_list"] or ()), strict=False)
            sent = self._exchange(pickle.dumps({rank: data for rank, data in own if rank in self.running}), group)
            given["scatter_object_output_list"][0] = pickle.loads(pickle.loads(sent[source])[self.rank])
        else:
            values = given.get("object_list", given.get("object_gather_list"))
            with self.aside():
                self._answers = self._of_group(given["obj"], group, is_wanted=values is not None)
            if self.is_measured and values is not None:
                usual(**given)
            else:
                pickle.dumps(given["obj"])  # as torch does
                loaded = {data: pickle.loads(data) for data in {*self._answers}}
                (values or [])[:] = [loaded[data] for data in self._answers]

    def _fill(self, *args: Any, gather_list: Any = None, **_: Any) -> None:
        """Stands for torch's gathers of tensors, as it calls them for objects: of the sizes, then of the pickles."""
        with self.aside():
            for output, data in zip(gather_list or args[0], self._answers, strict=True):
                if output.dtype == torch.int64:
                    output.fill_(len(data))
                else:
                    output[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)

    def _members(self, group: Any) -> Sequence[int]:
        return range(self.grid.world_size) if group is None else dist.get_process_group_ranks(group)

    def _exchange(self, data: bytes, group: Any) -> dict[int, bytes]:
        """What each running rank of the group gives."""
        with self.aside():
            members = self._members(group)
            name = f"{members[0]}-{members[-1]}-{len(members)}"
            self._num_calls[name] += 1
            call = f"{name}/{self._num_calls[name]}"
            for at in range(0, len(data) + 1, MOST_BYTES):
                is_last = at + MOST_BYTES > len(data)
                self.store.set(f"{call}/{self.rank}/{at}", (b"." if is_last else b"+") + data[at : at + MOST_BYTES])
            return {rank: self._given(f"{call}/{rank}") for rank in self.running if rank in members}

    def _given(self, key: str, at: int = 0) -> bytes:
        data = self.store.get(f"{key}/{at}")
        return data[1:] + (b"" if data[:1] == b"." else self._given(key, at + MOST_BYTES))

    def _of_group(self, value: Any, group: Any, is_wanted: bool = True) -> list[bytes]:
        """The pickle of each rank of a group. The files that absent ranks have created are links, by the first rank."""
        kind, files = type(value), []
        if group is None:
            files, self.created = self.created, []
        texts = pickle.dumps(sorted(value) if kind is set else value, 0), pickle.dumps(files, 0)
        given = {rank: pickle.loads(sent) for rank, sent in self._exchange(pickle.dumps(texts), group).items()}
        members = self._members(group)
        if not is_wanted or len({*given.values()}) == 1:
            return [pickle.dumps(value)] * len(members)

        @cache
        def like(which: int, anchor: int) -> Moved:
            near = self.grid.neighbours(anchor).items()
            return Moved(given[anchor][which], {axis: given[rank][which] for axis, rank in near if rank in given})

        @cache
        def moved(which: int, anchor: int, *steps: tuple[int, int]) -> Any:
            result = like(which, anchor).at(dict(steps))
            return result if which else pickle.dumps({*result} if kind is set else result)

        def of_rank(which: int, rank: int) -> Any:
            anchor = next(candidate for candidate in (rank, self.grid.anchor(rank), min(given)) if candidate in given)
            far = zip(range(3), self.grid.place(rank), self.grid.place(anchor), strict=True)
            return moved(which, anchor, *((axis, to - at) for axis, to, at in far if axis in like(which, anchor).axes))

        for rank in members if self.rank == 0 and any(pickle.loads(names) for _, names in given.values()) else ():
            anchor = self.grid.anchor(rank)
            for path, name in zip(of_rank(1, anchor), of_rank(1, rank), strict=True) if rank not in given else ():
                with suppress(OSError):  # it is gone, or a file of several ranks
                    os.link(path, name)
        return [of_rank(0, rank) for rank in members]
