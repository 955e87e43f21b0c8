"""Microbatches of samples, and global batches that do not depend on the layout."""

import math
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import count, islice
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_peft.data.samples import PackedOrder, Sample, SampleOrder, SampleSource


@dataclass(frozen=True)
class Microbatch:
    """What one forward pass reads: b padded rows of s positions, or one packed row of n sequences.

    Padding has loss_mask 0; at the end of a packed row it is sequences of its own.
    """

    tokens: Tensor  # int64 [b, s]
    labels: Tensor  # int64 [b, s], shifted already
    loss_mask: Tensor  # float32 [b, s]
    position_ids: Tensor  # int64 [b, s]
    num_samples: int  # without padding
    cu_seqlens: Tensor | None = None  # packed: int32 [n + 1], where each sequence begins, and the row's end
    lengths: tuple[int, ...] | None = None  # of the sequences, on the host, which need not ask the device for them

    def to(self, device: torch.device) -> "Microbatch":
        """The same on `device`; the host does not wait for the copies to a GPU."""
        tensors = {name: x for name, x in vars(self).items() if isinstance(x, Tensor)}
        if device.type == "cuda":  # only from such memory a copy is asynchronous
            tensors = {name: x.pin_memory() for name, x in tensors.items()}
        return replace(self, **{name: x.to(device, non_blocking=True) for name, x in tensors.items()})

    @property
    def num_pairs(self) -> int:
        """Pairs of a position and another that it attends to (itself, or before it in its sequence), with padding."""
        num_rows, num_positions = self.tokens.shape
        lengths = self.lengths or [num_positions] * num_rows
        return sum(length * (length + 1) // 2 for length in lengths)

    @property
    def num_loss_tokens(self) -> int:
        """Tokens that the loss counts."""
        return int(self.loss_mask.sum())


def pad(rows: Sequence[Sequence[Sample]], multiple: int, pad_id: int, at_least: int = 0) -> Microbatch:
    """One sample (or none) per row, padded on the right to the longest one, and to `at_least` positions, rounded up to
    `multiple`: with sequence parallelism the tensor-parallel ranks share a sequence evenly."""
    samples = [row[0] if row else _padding(0, pad_id) for row in rows]
    width = _round_up(max(at_least, *(len(sample) for sample in samples)), multiple)
    parts = [part for sample in samples for part in (sample, _padding(width - len(sample), pad_id))]
    return Microbatch(
        **_joined(parts, len(rows)),
        position_ids=torch.arange(width).expand(len(rows), width).contiguous(),
        num_samples=sum(len(row) for row in rows),
    )


def pack(rows: Sequence[Sequence[Sample]], multiple: int, pad_id: int, at_least: int = 0) -> Microbatch:
    """All samples of all packs in a single row, Megatron's `thd` format; see `pad`, `at_least` counts for each pack."""
    samples = [sample for row in rows for sample in row]
    total = sum(len(sample) for sample in samples)
    missing = _round_up(max(total, at_least * len(rows)), multiple) - total
    # A sequence of padding is no longer than a pack may be.
    longest = at_least or missing
    parts = [*samples, *(_padding(min(longest, missing - done), pad_id) for done in range(0, missing, longest or 1))]
    lengths = [len(part) for part in parts]
    return Microbatch(
        **_joined(parts, 1),
        position_ids=torch.from_numpy(np.concatenate([np.arange(length) for length in lengths])).unsqueeze(0),
        num_samples=len(samples),
        cu_seqlens=torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int32)),
        lengths=tuple(lengths),
    )


def _joined(parts: Sequence[Sample], num_rows: int) -> dict[str, Any]:
    """Tokens, labels and loss mask of the parts one after the other, cut into rows of equal length."""
    arrays = {name: np.concatenate([vars(part)[name] for part in parts]) for name in ("tokens", "labels", "loss_mask")}
    return {name: torch.from_numpy(array).view(num_rows, -1) for name, array in arrays.items()}


def _padding(length: int, pad_id: int) -> Sample:
    ids = np.full(length, pad_id, dtype=np.int64)
    return Sample(ids, ids, np.zeros(length, dtype=np.float32))


def _round_up(length: int, multiple: int) -> int:
    """A multiple that is at least `length`, and never 0: a microbatch without samples still runs."""
    return max(-(-length // multiple), 1) * multiple


Step = list[Microbatch]


@dataclass(frozen=True)
class BatchLayout:
    """How a global batch is split over data-parallel ranks, in positions (samples, or packs)."""

    global_batch_size: int
    micro_batch_size: int
    data_parallel_rank: int = 0
    data_parallel_size: int = 1
    pad_multiple: int = 1  # the sequence is rounded up to a multiple of it
    pad_to: int = 0  # and is no shorter than this
    pad_id: int = 0  # the token of padding

    def microbatches(self, first: int) -> list[range]:
        """Positions of each microbatch of this rank in the global batch that begins at `first`."""
        # As in Megatron: consecutive chunks of micro_batch_size x data_parallel_size, each split over the ranks.
        chunk = self.micro_batch_size * self.data_parallel_size
        mine = first + self.data_parallel_rank * self.micro_batch_size
        starts = range(mine, mine + self.global_batch_size, chunk)
        return [range(start, start + self.micro_batch_size) for start in starts]


@dataclass(eq=False)
class GlobalBatches:
    """An endless (training) or single (evaluation) pass over a dataset, a step at a time.

    consumed_samples: where a training source starts. It is all of its state, and advances with each step.
    end: positions of an evaluation, which always starts at 0. The last step is filled up with padding, so that all
    ranks have the same number of microbatches.
    prefetch: number of steps built ahead, and of threads. A step depends on its first position alone.
    """

    dataset: SampleSource
    order: SampleOrder
    layout: BatchLayout
    consumed_samples: int = 0
    end: int | None = None
    prefetch: int = 0

    @property
    def num_steps(self) -> int | None:
        """Steps of an evaluation; None for training, which has no end."""
        return None if self.end is None else math.ceil(self.end / self.layout.global_batch_size)

    def own_samples(self) -> list[int]:
        """The samples of an evaluation that this rank reads, in its order, by their number in the dataset."""
        assert self.end is not None
        firsts = range(0, self.end, self.layout.global_batch_size)
        positions = (p for first in firsts for positions in self.layout.microbatches(first) for p in positions)
        return [int(i) for p in positions if p < self.end for i in self.order.samples_at(p)]

    def step_at(self, first: int) -> Step:
        """This rank's microbatches of the global batch that begins at position `first`."""
        return [self._collated([self._samples(p) for p in positions]) for positions in self.layout.microbatches(first)]

    def _collated(self, rows: Sequence[Sequence[Sample]]) -> Microbatch:
        collate, layout = pack if isinstance(self.order, PackedOrder) else pad, self.layout
        return collate(rows, layout.pad_multiple, layout.pad_id, layout.pad_to)

    def in_few_microbatches(self, num_steps: int, max_positions: int, multiple: int) -> Step:
        """This rank's samples of the first global batches, those of like lengths together: for a sum over all of them.

        max_positions: of a microbatch, padding included, unless one sample (or pack) has more.
        """
        layout, groups, width = self.layout, [], 0
        firsts = range(0, num_steps * layout.global_batch_size, layout.global_batch_size)
        rows = [self._samples(p) for first in firsts for positions in layout.microbatches(first) for p in positions]
        for num_positions, row in sorted(((sum(map(len, row)), row) for row in rows), key=itemgetter(0), reverse=True):
            if not groups or (len(groups[-1]) + 1) * width > max_positions:
                groups.append([])
                width = _round_up(max(layout.pad_to, num_positions), layout.pad_multiple)
            groups[-1].append(row)
        while len(groups) % multiple:
            most = max(groups, key=len)
            groups.append([most.pop() for _ in range(len(most) // 2)])
        return [self._collated(group) for group in groups]

    def __iter__(self) -> Iterator[Step]:
        size = self.layout.global_batch_size
        if self.end is not None:
            yield from self._build(iter(range(0, self.end, size)))
            return
        for step in self._build(count(self.consumed_samples, size)):
            self.consumed_samples += size
            yield step

    def _samples(self, position: int) -> list[Sample]:
        is_past_end = self.end is not None and position >= self.end
        return [] if is_past_end else [self.dataset[int(i)] for i in self.order.samples_at(position)]

    def _build(self, firsts: Iterator[int]) -> Iterator[Step]:
        if not self.prefetch:
            yield from map(self.step_at, firsts)
            return
        with ThreadPoolExecutor(self.prefetch, thread_name_prefix="prefetch") as pool:
            waiting = deque(pool.submit(self.step_at, first) for first in islice(firsts, self.prefetch))
            while waiting:
                step = waiting.popleft().result()
                waiting.extend(pool.submit(self.step_at, first) for first in islice(firsts, 1))
                yield step
