"""Samples as the tensors of one microbatch: padded rows, or one packed row. b rows, s positions."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor


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


EMPTY = Sample(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))


@dataclass(frozen=True)
class Microbatch:
    """What one forward pass reads. Padding has loss_mask 0.

    tokens, labels, position_ids: int64 [b, s]; loss_mask: float32 [b, s]. Labels are shifted already.
    cu_seqlens (packed only): int32 [n + 1], where each of the n sequences in the one row begins, and the row's end;
    padding at the end is a sequence of its own. max_seqlen: the longest of them. num_samples: real ones.
    """

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    position_ids: Tensor
    num_samples: int
    cu_seqlens: Tensor | None = None
    max_seqlen: int | None = None

    def to(self, device: torch.device) -> "Microbatch":
        """The same on `device`."""
        moved = {name: x.to(device) for name, x in vars(self).items() if isinstance(x, Tensor)}
        return replace(self, **moved)

    @property
    def num_loss_tokens(self) -> int:
        """Tokens that the loss counts."""
        return int(self.loss_mask.sum())


def pad(rows: Sequence[Sequence[Sample]], multiple: int, pad_id: int) -> Microbatch:
    """One sample a row (none: a row of padding), to the right of which is padding up to the longest one, rounded up to
    `multiple` positions (tensor-parallel ranks under sequence parallelism share a sequence evenly)."""
    samples = [row[0] if row else EMPTY for row in rows]
    width = _round_up(max(len(sample) for sample in samples), multiple)
    return Microbatch(
        tokens=_rows([sample.tokens for sample in samples], width, pad_id),
        labels=_rows([sample.labels for sample in samples], width, pad_id),
        loss_mask=_rows([sample.loss_mask for sample in samples], width, 0.0),
        position_ids=torch.arange(width).expand(len(samples), width).contiguous(),
        num_samples=sum(len(row) for row in rows),
    )


def pack(rows: Sequence[Sequence[Sample]], multiple: int, pad_id: int) -> Microbatch:
    """All samples of all packs one after the other in a single row, Megatron's `thd` format; see `pad`."""
    samples = [sample for row in rows for sample in row]
    total = sum(len(sample) for sample in samples)
    padding = _padding(_round_up(total, multiple) - total, pad_id)
    parts = [*samples, padding] if len(padding) else samples
    lengths = [len(part) for part in parts]
    return Microbatch(
        tokens=_join([part.tokens for part in parts]),
        labels=_join([part.labels for part in parts]),
        loss_mask=_join([part.loss_mask for part in parts]),
        position_ids=_join([np.arange(length) for length in lengths]),
        num_samples=len(samples),
        cu_seqlens=torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int32)),
        max_seqlen=max(lengths),
    )


def _padding(length: int, pad_id: int) -> Sample:
    ids = np.full(length, pad_id, dtype=np.int64)
    return Sample(ids, ids, np.zeros(length, dtype=np.float32))


def _round_up(length: int, multiple: int) -> int:
    """At least one multiple: a microbatch without samples still runs."""
    return max(-(-length // multiple), 1) * multiple


def _rows(rows: Sequence[np.ndarray], width: int, value: float) -> Tensor:
    padded = np.full((len(rows), width), value, dtype=rows[0].dtype)
    for target, row in zip(padded, rows, strict=True):
        target[: len(row)] = row
    return torch.from_numpy(padded)


def _join(parts: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts)).unsqueeze(0)
