"""--pack-sequences: which samples share a sequence.

The samples of an epoch, in its order, are put one after the other into a sequence until the next would not fit
(next-fit). No sample is cut, and none attends to another (`microbatch.pack` keeps the boundaries).
"""

from functools import lru_cache

import numpy as np

from megatron_peft.data.order import SampleOrder


def pack_bounds(lengths: np.ndarray, seq_length: int) -> np.ndarray:
    """lengths: int [n], each at most `seq_length`. Returns int64 [packs + 1]: pack i is samples [b[i], b[i + 1])."""
    ends = np.cumsum(lengths, dtype=np.int64)
    bounds = [0]
    while bounds[-1] < len(lengths):
        used = ends[bounds[-1] - 1] if bounds[-1] else 0
        bounds.append(int(np.searchsorted(ends, used + seq_length, side="right")))
    return np.asarray(bounds)


class PackedOrder(SampleOrder):
    """One pack a position. Epochs differ in their number of packs, since each packs its own permutation."""

    def __init__(self, lengths: np.ndarray, seq_length: int, seed: int, shuffle: bool) -> None:
        super().__init__(len(lengths), seed, shuffle)
        self.lengths = lengths
        self.seq_length = seq_length
        self._bounds = lru_cache(maxsize=2)(self._pack)
        self._num_packs = lru_cache(maxsize=None)(lambda epoch: len(self._bounds(epoch)) - 1)

    def _pack(self, epoch: int) -> np.ndarray:
        epoch = epoch if self.shuffle else 0
        return pack_bounds(self.lengths[self.permutation(epoch)], self.seq_length)

    def epoch_length(self, epoch: int) -> int:
        return self._num_packs(epoch)

    def unit(self, epoch: int, offset: int) -> np.ndarray:
        start, stop = self._bounds(epoch)[offset : offset + 2]
        return self.permutation(epoch)[start:stop]

    def locate(self, position: int) -> tuple[int, int]:
        epoch = 0
        while position >= self.epoch_length(epoch):
            position -= self.epoch_length(epoch)
            epoch += 1
        return epoch, position
