"""How one Megatron parameter is made of Hugging Face tensors, and how they are made of it.

A rule is one object that goes both ways. It lists *pieces*: a region of a Hugging Face tensor, and the view of a
rank's local Megatron tensor that holds the same numbers. Reading copies the region into the view, writing copies the
view into the region, so nothing is assembled in between and a rank asks for its own bytes only.

Shapes: h hidden, tp tensor-parallel size, rank the tensor-parallel rank. A Megatron "global" tensor (of a distributed
checkpoint) is the local one of rank 0 at tp = 1.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from megatron_peft.config import require
from megatron_peft.models.shape import ModelShape

if TYPE_CHECKING:  # a command line is checked against a model without waiting for torch
    from torch import Tensor

Index = tuple[slice, ...]


class SliceSource(Protocol):
    """Where Hugging Face tensors are read from."""

    def slice(self, name: str, index: Index) -> Tensor:
        """`tensor[index]`, possibly a lazy view of a file: copy it at once."""
        ...


@dataclass(frozen=True)
class Part:
    """One Hugging Face tensor that a rule reads and writes."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Piece:
    """The same numbers on both sides: `tensor(name)[index]` flattens to `view` flattened."""

    name: str
    index: Index
    view: Tensor


@dataclass(frozen=True)
class Region:
    """A box of a Megatron global tensor, by its corner, and the view of a rank's local tensor that holds it."""

    offset: tuple[int, ...]
    view: Tensor


@dataclass(frozen=True)
class Rule(ABC):
    """One Megatron parameter (`name`, with the global layer number) and its Hugging Face parts."""

    name: str
    parts: tuple[Part, ...]

    @abstractmethod
    def local_shape(self, size: int) -> tuple[int, ...]:
        """Shape of the parameter on one of `size` ranks. ConfigurationError where `size` does not divide it."""

    @abstractmethod
    def pieces(self, local: Tensor, rank: int, size: int) -> Iterator[Piece]:
        """The pieces of `rank`'s local tensor; `local` is contiguous."""

    def accepts(self, shape: Sequence[int], size: int) -> bool:
        """Whether a rank's parameter may have this shape."""
        return tuple(shape) == self.local_shape(size)

    def regions(self, local: Tensor, rank: int, size: int) -> Iterator[Region]:
        """Where `rank`'s local tensor lies in the global one: its share of the dimension that tp cuts, if any."""
        sides = zip(local.shape, self.local_shape(size), self.local_shape(1), strict=True)
        yield Region(tuple(rank * length * (share != whole) for length, share, whole in sides), local)

    def clear_padding(self, local: Tensor, rank: int) -> None:
        """Zero what `rank`'s local tensor holds beyond the Hugging Face tensors: for most, nothing."""
        return

    def read(self, local: Tensor, source: SliceSource, rank: int, size: int) -> None:
        """Fill `rank`'s local tensor in place, in its own dtype and on its own device."""
        for piece in self.pieces(local.detach(), rank, size):
            piece.view.copy_(source.slice(piece.name, piece.index).reshape(piece.view.shape))
        self.clear_padding(local, rank)

    def write(self, shards: Sequence[Tensor]) -> dict[str, Tensor]:
        """The Hugging Face tensors, from the local tensors of all ranks in order (a global tensor is `[tensor]`).

        One that lies in a global tensor in one stretch shares its memory.
        """
        shards = [shard.detach() for shard in shards]
        whole = list(self.pieces(shards[0], 0, 1)) if len(shards) == 1 else []
        if len(whole) == len(self.parts):
            return {piece.name: piece.view.reshape(part.shape) for piece, part in zip(whole, self.parts, strict=True)}
        tensors = {part.name: shards[0].new_empty(part.shape) for part in self.parts}
        for rank, shard in enumerate(shards):
            for piece in self.pieces(shard, rank, len(shards)):
                region = tensors[piece.name][piece.index]
                region.copy_(piece.view.reshape(region.shape))
        return tensors

    def _share(self, total: int, size: int, what: str) -> int:
        require(
            total % size == 0,
            f"{self.name}: {total} {what} cannot be split over --tensor-model-parallel-size {size}: "
            f"use a divisor of {total}.",
        )
        return total // size


class Replicated(Rule):
    """Whole on every rank: norms, biases of row-parallel layers."""

    def local_shape(self, size: int) -> tuple[int, ...]:
        return self.parts[0].shape

    def pieces(self, local: Tensor, rank: int, size: int) -> Iterator[Piece]:
        yield Piece(self.parts[0].name, (slice(None),) * local.dim(), local)


class Columns(Rule):
    """A row-parallel weight [out, in]: a rank holds in / tp columns."""

    def local_shape(self, size: int) -> tuple[int, ...]:
        rows, columns = self.parts[0].shape
        return rows, self._share(columns, size, "input features")

    def pieces(self, local: Tensor, rank: int, size: int) -> Iterator[Piece]:
        yield Piece(self.parts[0].name, (slice(None), _nth(rank, self.local_shape(size)[1])), local)


@dataclass(frozen=True)
class FusedRows(Rule):
    """A column-parallel weight [out, in] or bias [out], fused of the rows of several tensors.

    The rows are cut into groups and each group holds its rows of every part, in the parts' order. With `num_groups`
    None a rank's rows are one group (fc1: [gate_r; up_r]); else there are `num_groups` over all ranks (linear_qkv:
    [q x (heads / groups), k, v] a key-value head), and tp divides them.
    """

    num_groups: int | None

    def local_shape(self, size: int) -> tuple[int, ...]:
        self._local_groups(size)
        return sum(self._local_rows(size)), *self.parts[0].shape[1:]

    def pieces(self, local: Tensor, rank: int, size: int) -> Iterator[Piece]:
        num_groups = self._local_groups(size)
        grouped = local.view(num_groups, -1, *local.shape[1:])
        start = 0
        for part, rows in zip(self.parts, self._local_rows(size), strict=True):
            width = rows // num_groups
            yield Piece(part.name, _rows(_nth(rank, rows), local), grouped.narrow(1, start, width))
            start += width

    def regions(self, local: Tensor, rank: int, size: int) -> Iterator[Region]:
        """Without groups the global tensor has whole parts one after another, and a rank holds some rows of each."""
        if self.num_groups is not None:
            yield from super().regions(local, rank, size)
            return
        start, offset = 0, 0
        for part, rows in zip(self.parts, self._local_rows(size), strict=True):
            corner = (offset + rank * rows,) + (0,) * (local.dim() - 1)
            yield Region(corner, local.narrow(0, start, rows))
            start, offset = start + rows, offset + part.shape[0]

    def _local_groups(self, size: int) -> int:
        return 1 if self.num_groups is None else self._share(self.num_groups, size, "key-value heads")

    def _local_rows(self, size: int) -> list[int]:
        return [self._share(part.shape[0], size, f"rows of {part.name}") for part in self.parts]


class VocabularyRows(Rule):
    """Embedding or output layer: rows padded with zeros to a multiple of tp, then split.

    How far they are padded is the model's own choice: `pieces` takes it from the local tensor.
    """

    def local_shape(self, size: int) -> tuple[int, ...]:
        """The smallest one."""
        return -(-self._num_rows // size), *self.parts[0].shape[1:]

    def accepts(self, shape: Sequence[int], size: int) -> bool:
        smallest = self.local_shape(size)
        return len(shape) == len(smallest) and shape[0] >= smallest[0] and tuple(shape[1:]) == smallest[1:]

    def pieces(self, local: Tensor, rank: int, size: int) -> Iterator[Piece]:
        start = rank * local.shape[0]
        stop = min(start + local.shape[0], self._num_rows)
        if stop > start:
            yield Piece(self.parts[0].name, _rows(slice(start, stop), local), local[: stop - start])

    def regions(self, local: Tensor, rank: int, size: int) -> Iterator[Region]:
        """Always a rank's rows, also where the vocabulary is so small that its padding alone makes several shares."""
        yield Region((rank * local.shape[0], *(0,) * (local.dim() - 1)), local)

    def clear_padding(self, local: Tensor, rank: int) -> None:
        filled = min(max(self._num_rows - rank * local.shape[0], 0), local.shape[0])
        local.detach()[filled:].zero_()

    @property
    def _num_rows(self) -> int:
        return self.parts[0].shape[0]


def vocabulary_rules(shape: ModelShape, embedding: str, output: str) -> list[Rule]:
    """Embedding and output layer, of one Hugging Face tensor where they are tied."""

    def rows(name: str, module: str) -> Rule:
        return VocabularyRows(name, (Part(f"{module}.weight", (shape.vocab_size, shape.hidden_size)),))

    output = embedding if shape.tied_embeddings else output
    return [rows("embedding.word_embeddings.weight", embedding), rows("output_layer.weight", output)]


def expected_tensors(rules: Mapping[str, Rule]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every Hugging Face tensor that the rules know."""
    return {part.name: part.shape for rule in rules.values() for part in rule.parts}


def _nth(rank: int, length: int) -> slice:
    return slice(rank * length, (rank + 1) * length)


def _rows(rows: slice, tensor: Tensor) -> Index:
    return rows, *(slice(None),) * (tensor.dim() - 1)
