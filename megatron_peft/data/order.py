"""In which order the samples of a dataset are seen: a function of seed and epoch alone, never of the layout.

A *position* counts what a global batch counts: a sample, or with packing a pack of samples. Positions run on from one
epoch into the next; nothing is dropped, and nothing comes twice within an epoch.
"""

import math
from functools import lru_cache

import numpy as np


class SampleOrder:
    """One sample a position; each epoch a new permutation, or file order without `shuffle`."""

    def __init__(self, num_samples: int, seed: int, shuffle: bool) -> None:
        self.num_samples = num_samples
        self.seed = seed
        self.shuffle = shuffle
        self.permutation = lru_cache(maxsize=2)(self._permutation)  # two: a step can reach into the next epoch

    def _permutation(self, epoch: int) -> np.ndarray:
        """int64 [num_samples]. RandomState, since numpy promises its stream for all later versions."""
        if not self.shuffle:
            return np.arange(self.num_samples)
        return np.random.RandomState([self.seed % 2**32, epoch]).permutation(self.num_samples)

    def epoch_length(self, epoch: int) -> int:
        """Positions of an epoch."""
        return self.num_samples

    def unit(self, epoch: int, offset: int) -> np.ndarray:
        """int64 [k]: the samples of one position."""
        return self.permutation(epoch)[offset : offset + 1]

    def locate(self, position: int) -> tuple[int, int]:
        """(epoch, offset in it) of a position."""
        return divmod(position, self.num_samples)

    def samples_at(self, position: int) -> np.ndarray:
        """int64 [k]: the samples of a position."""
        return self.unit(*self.locate(position))

    def epochs_at(self, position: int) -> float:
        """Epochs done when `position` positions are."""
        epoch, offset = self.locate(position)
        return epoch + offset / self.epoch_length(epoch)

    def positions_in(self, epochs: float) -> int:
        """Positions of the first `epochs` epochs, a begun one counted as a whole."""
        whole = math.floor(epochs)
        positions = sum(self.epoch_length(epoch) for epoch in range(whole))
        part = epochs - whole
        # 1e-9: 0.1 * 30 is 3.0000000000000004
        return positions + (math.ceil(part * self.epoch_length(whole) - 1e-9) if part else 0)
