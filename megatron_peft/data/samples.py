"""Samples, and which of them each position of training has: their order, their packs, their shares of a blend. numpy
alone."""

import math
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Protocol

import numpy as np


@dataclass(frozen=True)
class Sample:
    """`n` input positions: the model reads `tokens[i]` and predicts `labels[i]`; the loss counts it where
    `loss_mask[i]` is 1.

    tokens, labels: int64 [n]; loss_mask: float32 [n].
    """

    tokens: np.ndarray
    labels: np.ndarray
    loss_mask: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)


class SampleSource(Protocol):
    """Samples by number; a number always gives the same sample."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


def sample_from_ids(ids: Sequence[int], trained: Sequence[bool], seq_length: int) -> Sample:
    """Input positions of a text: each token but the last is read, each but the first is predicted.

    ids: the text's tokens; trained: which of them the loss counts. At most `seq_length` positions are kept, up to the
    last that the loss counts; if it counts none, the sample has length 0.
    """
    mask = np.asarray(trained[1 : seq_length + 1], dtype=np.float32)
    counted = np.flatnonzero(mask)
    length = int(counted[-1]) + 1 if len(counted) else 0
    return Sample(
        tokens=np.asarray(ids[:length], dtype=np.int64),
        labels=np.asarray(ids[1 : length + 1], dtype=np.int64),
        loss_mask=mask[:length],
    )


# The order of samples is a function of seed and epoch, never of the layout. A *position* is one unit of a global batch:
# a sample, or with packing a pack of samples. Positions run on from epoch to epoch; an epoch has each sample once.

Make = Callable[[], Sequence[np.ndarray]]
Keep = Callable[[str, int, type, Make], np.ndarray]  # kind, epoch, type, what makes the arrays -> one after the other


def in_memory(kind: str, epoch: int, dtype: type, make: Make) -> np.ndarray:
    """The arrays of an epoch, one after the other, in this process: see `node_files.NodeFiles.kept`."""
    return np.concatenate(make())


class SampleOrder:
    """One sample per position; a new permutation in each epoch, or file order without `shuffle`.

    keep: where the arrays of an epoch are, which take 4 bytes a sample (8 from 2**31 samples on).
    """

    epochs_hold_the_same_samples = True

    def __init__(self, num_samples: int, seed: int, shuffle: bool, keep: Keep = in_memory) -> None:
        self.num_samples, self.seed, self.shuffle, self.keep = num_samples, seed, shuffle, keep
        self.permutation = lru_cache(maxsize=2)(self._kept_permutation)  # two: a step can reach into the next epoch

    def _kept_permutation(self, epoch: int) -> np.ndarray:
        return self.keep("order", epoch, index_type(self.num_samples), lambda: [self._permutation(epoch)])

    def _permutation(self, epoch: int) -> np.ndarray:
        """int [num_samples]. RandomState, since numpy promises its stream for all later versions."""
        samples = np.arange(self.num_samples, dtype=index_type(self.num_samples))
        if self.shuffle:
            np.random.RandomState([self.seed % 2**32, epoch]).shuffle(samples)
        return samples

    def epoch_length(self, epoch: int) -> int:
        """Positions of an epoch."""
        return self.num_samples

    def locate(self, position: int) -> tuple[int, int]:
        """(epoch, offset in it) of a position."""
        return divmod(position, self.num_samples)

    def samples_at(self, position: int) -> np.ndarray:
        """int [k]: the samples of a position."""
        epoch, offset = self.locate(position)
        return self.permutation(epoch)[offset : offset + 1]

    def take(self, positions: np.ndarray) -> np.ndarray:
        """int64 [n]: the sample of each of n positions."""
        epochs, offsets = np.divmod(positions, self.num_samples)
        samples = np.empty(len(positions), dtype=np.int64)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            samples[chosen] = self.permutation(int(epoch))[offsets[chosen]]
        return samples

    def epochs_at(self, position: int) -> float:
        """Epochs done after `position` positions."""
        epoch, offset = self.locate(position)
        return epoch + offset / self.epoch_length(epoch)

    def positions_in(self, epochs: float) -> int:
        """Positions of the first `epochs` epochs, rounded up."""
        whole = math.floor(epochs)
        positions = sum(self.epoch_length(epoch) for epoch in range(whole))
        part = epochs - whole
        # 1e-9: 0.1 * 30 is 3.0000000000000004
        return positions + (math.ceil(part * self.epoch_length(whole) - 1e-9) if part else 0)


_LONGEST_ROUND = 10_000_000


class BlendedOrder(SampleOrder):
    """Samples of several sources, numbered through, in proportion to their weights: each has an order of its own, and
    begins again at its end. An "epoch" is a round of the blend, after which its pattern repeats."""

    epochs_hold_the_same_samples = False

    def __init__(
        self, lengths: Sequence[int], weights: Sequence[float], seed: int, shuffle: bool, keep: Keep = in_memory
    ) -> None:
        self._shares = np.asarray(weights, dtype=np.float64) / math.fsum(weights)
        # A source gets at least a thousand samples of a round, so rounding changes its share by a thousandth at most.
        needed = min(math.ceil(1000 / self._shares.min()), _LONGEST_ROUND)
        super().__init__(max(sum(lengths), needed), seed, shuffle, keep)
        self._lengths = lengths

    def _permutation(self, epoch: int) -> np.ndarray:
        from megatron.core.datasets import helpers_cpp  # pyright: ignore[reportAttributeAccessIssue] - it is compiled

        # Megatron's blend of a round: the source of each sample, and which of that source's samples it is.
        size, start = self.num_samples, 0
        sources, numbers = np.empty(size, dtype=np.int16), np.empty(size, dtype=np.int64)
        helpers_cpp.build_blending_indices(sources, numbers, self._shares, len(self._shares), size, False)
        samples = np.empty(size, dtype=index_type(size))
        for i, length in enumerate(self._lengths):
            chosen, order = sources == i, SampleOrder(length, self.seed + i, self.shuffle)
            samples[chosen] = start + order.take(epoch * int(chosen.sum()) + numbers[chosen])
            start += length
            order.permutation.cache_clear()  # an order refers to itself, and would be collected late
        return samples


def index_type(num_samples: int) -> type[np.signedinteger]:
    """The type of numbers up to `num_samples`."""
    return np.int32 if num_samples < 2**31 else np.int64


def stable_order(keys: np.ndarray, num_keys: int) -> tuple[np.ndarray, np.ndarray]:
    """Return `np.argsort(keys, kind="stable")`, int [n], and int [num_keys + 1], where the places of each key begin.

    keys: int [n], each below `num_keys`.
    """
    order = np.argsort(keys, kind="stable").astype(index_type(len(keys)))
    return order, np.concatenate([[0], np.cumsum(np.bincount(keys, minlength=num_keys))]).astype(order.dtype)


def pack_bounds(lengths: np.ndarray, seq_length: int) -> np.ndarray:
    """--pack-sequences by next-fit: samples, in their order, share a sequence until the next one would not fit.

    lengths: int [n], each at most `seq_length`. Returns int64 [packs + 1]: pack i is samples [b[i], b[i + 1]).
    """
    ends = np.cumsum(lengths, dtype=np.int64)
    bounds = array("q", [0])
    while bounds[-1] < len(lengths):
        used = ends[bounds[-1] - 1] if bounds[-1] else 0
        bounds.append(int(np.searchsorted(ends, used + seq_length, side="right")))
    return np.asarray(bounds)


def first_fit_decreasing(lengths: np.ndarray, seq_length: int) -> np.ndarray:
    """--pack-sequences by first-fit decreasing: the longest samples first, each into the first pack with room for it.

    lengths: int [n], each at least 1 and at most `seq_length`. Returns int [n]: the pack of each sample.
    """
    by_length, bounds = stable_order(lengths, seq_length + 1)
    del lengths  # of many samples there are two arrays at a time
    room = np.empty(len(by_length), dtype=np.int32)  # of each pack: memory is taken for those that are opened
    packs = np.empty_like(by_length)
    num_packs = 0
    for size in np.flatnonzero(np.diff(bounds))[::-1].tolist():
        samples = by_length[bounds[size] : bounds[size + 1]]
        # Samples of one length come one after the other, so each pack in turn takes as many of them as it has room for.
        has_room = np.flatnonzero(room[:num_packs] >= size)[: len(samples)]
        most_packs = num_packs - (-len(samples) // (seq_length // size))
        room[num_packs:most_packs] = seq_length
        chosen = np.append(has_room, np.arange(num_packs, most_packs))
        taken = room[chosen] // size
        ends = np.cumsum(taken)
        last = int(np.searchsorted(ends, len(samples)))
        chosen, taken = chosen[: last + 1], taken[: last + 1]
        taken[-1] -= ends[last] - len(samples)
        packs[samples] = np.repeat(chosen, taken)
        room[chosen] -= taken * size
        num_packs = max(num_packs, int(chosen[-1]) + 1)
    return packs


class PackedOrder(SampleOrder):
    """One pack per position. Epochs may differ in their number of packs, since each packs its own permutation.

    order: of the samples; lengths: int [samples]; packing: that of `DataConfig`.
    """

    def __init__(
        self, order: SampleOrder, lengths: np.ndarray, seq_length: int, packing: str = "first-fit-decreasing"
    ) -> None:
        super().__init__(order.num_samples, order.seed, order.shuffle, order.keep)
        self.order, self.lengths, self.seq_length, self.packing = order, lengths, seq_length, packing
        self._num_packs_is_constant = packing != "next-fit" and order.epochs_hold_the_same_samples
        self._packs = lru_cache(maxsize=2)(self._packs_of)
        self._num_packs = cache(lambda epoch: len(self._packs(epoch)[1]) - 1)

    def _packs_of(self, epoch: int) -> list[np.ndarray]:
        """Samples in the order of their packs, and int [packs + 1], where each pack begins."""
        kept = self.keep("packs", epoch, index_type(self.num_samples), lambda: self._pack(epoch))
        return np.split(kept, [self.num_samples])

    def _pack(self, epoch: int) -> list[np.ndarray]:
        samples = self.order.permutation(epoch)
        if self.packing == "next-fit":
            return [samples, pack_bounds(self.lengths[samples], self.seq_length).astype(samples.dtype)]
        packs = first_fit_decreasing(self.lengths[samples], self.seq_length)
        # The longest samples are in the first packs, so packs are shuffled. In an evaluation, each stands where its
        # first sample stood.
        num_packs = int(packs.max()) + 1
        if self.shuffle:
            places = np.arange(num_packs, dtype=packs.dtype)
            np.random.RandomState([self.seed % 2**32, epoch, num_packs]).shuffle(places)
        else:
            places = np.argsort(np.argsort(np.unique(packs, return_index=True)[1])).astype(packs.dtype)
        packs = places[packs]
        order, bounds = stable_order(packs, num_packs)
        del places, packs
        return [samples[order], bounds]

    def epoch_length(self, epoch: int) -> int:
        return self._num_packs(0 if self._num_packs_is_constant else epoch)

    def samples_at(self, position: int) -> np.ndarray:
        epoch, offset = self.locate(position)
        samples, bounds = self._packs(epoch)
        return samples[bounds[offset] : bounds[offset + 1]]

    def locate(self, position: int) -> tuple[int, int]:
        epoch = 0
        while position >= self.epoch_length(epoch):
            position -= self.epoch_length(epoch)
            epoch += 1
        return epoch, position
