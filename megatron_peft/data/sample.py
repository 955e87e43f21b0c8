"""One training sample as arrays, and what a source of samples looks like."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True)
class Sample:
    """`n` input positions: the model reads `tokens[i]` and is asked for `labels[i]`; the loss counts it where
    `loss_mask[i]` is 1.

    tokens, labels: int64 [n]; loss_mask: float32 [n].
    """

    tokens: np.ndarray
    labels: np.ndarray
    loss_mask: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)


class SampleSource(Protocol):
    """Samples by number. A sample is the same each time it is asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


def sample_from_ids(ids: Sequence[int], trained: Sequence[bool], seq_length: int) -> Sample:
    """Input positions of a text: each token but the last reads, each but the first is predicted.

    ids: the text's tokens; trained: which of them the loss counts. At most `seq_length` positions are kept, and
    none after the last that the loss counts (nothing is learnt there). Without any, the sample has length 0.
    """
    mask = np.asarray(trained[1 : seq_length + 1], dtype=np.float32)
    counted = np.flatnonzero(mask)
    length = int(counted[-1]) + 1 if len(counted) else 0
    return Sample(
        tokens=np.asarray(ids[:length], dtype=np.int64),
        labels=np.asarray(ids[1 : length + 1], dtype=np.int64),
        loss_mask=mask[:length],
    )
