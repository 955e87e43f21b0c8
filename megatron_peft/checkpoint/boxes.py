"""A stretch of a flattened tensor as boxes of the tensor.

The distributed optimizer gives a rank a stretch of each flattened parameter, cut anywhere. Files hold boxes of global
tensors, which any other layout can read from. A stretch of a matrix is at most three: the rest of a row, whole rows,
the start of a row.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Box:
    """Contiguous elements of a row-major tensor: `start` in the flattened tensor, corner and sides in the tensor."""

    start: int
    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def end(self) -> int:
        return self.start + math.prod(self.shape)


def boxes(start: int, end: int, shape: Sequence[int]) -> Iterator[Box]:
    """The elements start ... end - 1 of a flattened tensor of `shape` as boxes, in their order."""
    if start >= end:
        return
    if len(shape) <= 1:
        yield Box(start, (start,) * len(shape), (end - start,) * len(shape))
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), end // row  # whole rows: first ... last - 1
    if first > last:  # within one row
        yield from _in_row(last, start, end, shape)
        return
    yield from _in_row(first - 1, start, first * row, shape)
    if first < last:
        yield Box(first * row, (first,) + (0,) * (len(shape) - 1), (last - first, *shape[1:]))
    yield from _in_row(last, last * row, end, shape)


def _in_row(row: int, start: int, end: int, shape: Sequence[int]) -> Iterator[Box]:
    first = row * math.prod(shape[1:])
    for box in boxes(start - first, end - first, shape[1:]):
        yield Box(first + box.start, (row, *box.offset), (1, *box.shape))
