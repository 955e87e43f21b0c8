"""A global tensor that lies in pieces, each piece a box of it, and reading any box out of them."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor


@dataclass(frozen=True)
class StoredBox:
    """A box of a global tensor (corner and sides in elements) and how to read it; `load` may give a lazy view."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]
    load: Callable[[], Tensor]


@dataclass(frozen=True)
class StoredTensor:
    """A global tensor of a checkpoint."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    boxes: tuple[StoredBox, ...]

    @property
    def is_whole(self) -> bool:
        """Whether the boxes, which never overlap, fill the tensor."""
        return sum(prod(box.shape) for box in self.boxes) == prod(self.shape)

    @torch.no_grad()
    def fill(self, target: Tensor, offset: Sequence[int]) -> int:
        """Copy the box at `offset`, as large as `target`, into it; what lies outside the tensor stays as it is.

        Returns:
            Bytes read, in the stored type.
        """
        return sum(_copy_overlap(target, offset, box) for box in self.boxes)


def _copy_overlap(target: Tensor, offset: Sequence[int], box: StoredBox) -> int:
    sides = list(zip(offset, target.shape, box.offset, box.shape, strict=True))
    overlaps = [(max(a, c), min(a + b, c + d)) for a, b, c, d in sides]
    if any(start >= stop for start, stop in overlaps):
        return 0
    inside_target = tuple(slice(start - a, stop - a) for (start, stop), (a, *_) in zip(overlaps, sides, strict=True))
    inside_box = tuple(slice(start - c, stop - c) for (start, stop), (*_, c, _) in zip(overlaps, sides, strict=True))
    stored = box.load()[inside_box]
    target[inside_target].copy_(stored)
    return stored.numel() * stored.element_size()


def layer_of(stack: StoredTensor, layer: int) -> StoredTensor:
    """One layer of tensors that are stored as one, with the layers along the first dimension."""
    boxes = (box for box in stack.boxes if box.offset[0] <= layer < box.offset[0] + box.shape[0])
    return StoredTensor(stack.shape[1:], stack.dtype, tuple(_layer_of_box(box, layer) for box in boxes))


def _layer_of_box(box: StoredBox, layer: int) -> StoredBox:
    return StoredBox(box.offset[1:], box.shape[1:], lambda: box.load()[layer - box.offset[0]])


def union(boxes: Iterable[StoredBox]) -> tuple[StoredBox, ...]:
    """The boxes without those that repeat an earlier one's place: copies on several ranks."""
    return tuple({box.offset: box for box in reversed(list(boxes))}.values())
