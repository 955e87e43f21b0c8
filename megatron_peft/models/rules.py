"""Rules that convert Megatron parameters from and to Hugging Face tensors.

A rule works in both directions. It lists the slices of Hugging Face tensors and, for each, the view of a rank's local
Megatron tensor with the same values. Reading copies a slice into its view and writing copies a view into its slice, so
a rank reads only its own bytes.

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

if TYPE_CHECKING:  # checking a command line against a model does not import torch
    from torch import Tensor

Index = tuple[slice, ...]
WEIGHT = ".weight"


class SliceSource(Protocol):
    """Holds Hugging Face tensors by name."""

    def slice(self, name: str, index: Index) -> Tensor:
        """`tensor[index]`. It may be a lazy view of a file: copy it at once."""
        ...


@dataclass(frozen=True)
class HFTensor:
    """A Hugging Face tensor that a rule reads and writes."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class HFSlice:
    """A slice of a Hugging Face tensor: `tensor(name)[index]`, flattened, has the values of `view`, flattened."""

    name: str
    index: Index
    view: Tensor


@dataclass(frozen=True)
class GlobalSlice:
    """A slice of a Megatron global tensor: its first index in each dimension, and the view of a local tensor."""

    offset: tuple[int, ...]
    view: Tensor


@dataclass(frozen=True)
class RowRange:
    """Consecutive rows of a Hugging Face tensor that are consecutive rows of its Megatron parameter too."""

    name: str  # of the Hugging Face tensor
    hf: slice
    megatron: slice


@dataclass(frozen=True)
class Rule(ABC):
    """One Megatron parameter (`name`, with the global layer number) and the Hugging Face tensors that it holds."""

    name: str
    hf_tensors: tuple[HFTensor, ...]

    @property
    def is_linear(self) -> bool:
        """Whether it is the weight of a linear layer that takes an adapter."""
        return ".linear_" in self.name and self.name.endswith(WEIGHT)

    @property
    def layer(self) -> str:
        """Megatron's layer whose weight it is."""
        return self.name.removesuffix(WEIGHT)

    @property
    def modules(self) -> dict[str, tuple[int, ...]]:
        """The Hugging Face modules whose weights it holds, with the shapes [out, in] of the weights."""
        return {tensor.name.removesuffix(WEIGHT): tensor.shape for tensor in self.hf_tensors}

    @abstractmethod
    def local_shape(self, size: int) -> tuple[int, ...]:
        """Shape of the parameter on one of `size` ranks. ConfigurationError if `size` does not divide it."""

    @abstractmethod
    def hf_slices(self, local: Tensor, rank: int, size: int) -> Iterator[HFSlice]:
        """The Hugging Face slices that `rank`'s local tensor, which is contiguous, consists of."""

    def accepts(self, shape: Sequence[int], size: int) -> bool:
        """Whether a rank's parameter may have this shape."""
        return tuple(shape) == self.local_shape(size)

    def global_slices(self, local: Tensor, rank: int, size: int) -> Iterator[GlobalSlice]:
        """The slices of the global tensor that `rank` holds: usually one, cut in the dimension that tp splits."""
        sides = zip(local.shape, self.local_shape(size), self.local_shape(1), strict=True)
        yield GlobalSlice(tuple(rank * length * (share != whole) for length, share, whole in sides), local)

    def clear_padding(self, local: Tensor, rank: int) -> None:
        """Zero the rows of `rank`'s local tensor that no Hugging Face tensor has."""
        return

    def read(self, local: Tensor, source: SliceSource, rank: int, size: int) -> None:
        """Fill `rank`'s local tensor in place, in its own dtype and on its own device."""
        for hf_slice in self.hf_slices(local.detach(), rank, size):
            hf_slice.view.copy_(source.slice(hf_slice.name, hf_slice.index).reshape(hf_slice.view.shape))
        self.clear_padding(local, rank)

    def write(self, shards: Sequence[Tensor]) -> dict[str, Tensor]:
        """The Hugging Face tensors, from the local tensors of all ranks in order (a global tensor is `[tensor]`).

        A tensor that is one contiguous slice of a global tensor shares its memory.
        """
        shards = [shard.detach() for shard in shards]
        whole = list(self.hf_slices(shards[0], 0, 1)) if len(shards) == 1 else []
        if len(whole) == len(self.hf_tensors):
            return {
                hf_slice.name: hf_slice.view.reshape(tensor.shape)
                for hf_slice, tensor in zip(whole, self.hf_tensors, strict=True)
            }
        tensors = {tensor.name: shards[0].new_empty(tensor.shape) for tensor in self.hf_tensors}
        for rank, shard in enumerate(shards):
            for hf_slice in self.hf_slices(shard, rank, len(shards)):
                target = tensors[hf_slice.name][hf_slice.index]
                target.copy_(hf_slice.view.reshape(target.shape))
        return tensors

    def _share(self, total: int, size: int, what: str) -> int:
        require(
            total % size == 0,
            f"{self.name}: {total} {what} cannot be split over --tensor-model-parallel-size {size}: "
            f"use a divisor of {total}.",
        )
        return total // size


class Replicated(Rule):
    """Replicated over tensor-parallel ranks: norms, biases of row-parallel layers."""

    def local_shape(self, size: int) -> tuple[int, ...]:
        return self.hf_tensors[0].shape

    def hf_slices(self, local: Tensor, rank: int, size: int) -> Iterator[HFSlice]:
        yield HFSlice(self.hf_tensors[0].name, (slice(None),) * local.dim(), local)


class Columns(Rule):
    """A row-parallel weight [out, in]: each rank holds in / tp columns."""

    def local_shape(self, size: int) -> tuple[int, ...]:
        rows, columns = self.hf_tensors[0].shape
        return rows, self._share(columns, size, "input features")

    def hf_slices(self, local: Tensor, rank: int, size: int) -> Iterator[HFSlice]:
        yield HFSlice(self.hf_tensors[0].name, (slice(None), _nth(rank, self.local_shape(size)[1])), local)


@dataclass(frozen=True)
class FusedRows(Rule):
    """A column-parallel weight [out, in] or bias [out] that fuses the rows of several tensors.

    Each group of rows holds some rows of every tensor, in order. With `num_groups` None, the rows of a rank are one
    group (fc1: [gate_r; up_r]). Otherwise all ranks together have `num_groups`, which tp divides (linear_qkv:
    [q x (heads / groups), k, v] for each key-value head).
    """

    num_groups: int | None

    def local_shape(self, size: int) -> tuple[int, ...]:
        self._local_groups(size)
        return sum(self._local_rows(size)), *self.hf_tensors[0].shape[1:]

    def hf_slices(self, local: Tensor, rank: int, size: int) -> Iterator[HFSlice]:
        num_groups = self._local_groups(size)
        grouped = local.view(num_groups, -1, *local.shape[1:])
        start = 0
        for tensor, rows in zip(self.hf_tensors, self._local_rows(size), strict=True):
            width = rows // num_groups
            yield HFSlice(tensor.name, _rows(_nth(rank, rows), local), grouped.narrow(1, start, width))
            start += width

    def global_slices(self, local: Tensor, rank: int, size: int) -> Iterator[GlobalSlice]:
        """A rank holds some rows of each tensor that the global one concatenates, where there are no groups."""
        if self.num_groups is not None:
            yield from super().global_slices(local, rank, size)
            return
        start, offset = 0, 0
        for tensor, rows in zip(self.hf_tensors, self._local_rows(size), strict=True):
            first = (offset + rank * rows,) + (0,) * (local.dim() - 1)
            yield GlobalSlice(first, local.narrow(0, start, rows))
            start, offset = start + rows, offset + tensor.shape[0]

    def _local_groups(self, size: int) -> int:
        return 1 if self.num_groups is None else self._share(self.num_groups, size, "key-value heads")

    def _local_rows(self, size: int) -> list[int]:
        return [self._share(tensor.shape[0], size, f"rows of {tensor.name}") for tensor in self.hf_tensors]


class VocabularyRows(Rule):
    """Embedding or output layer: rows padded with zeros to a multiple of tp, then split.

    The model decides how much padding there is: `hf_slices` takes it from the local tensor.
    """

    def local_shape(self, size: int) -> tuple[int, ...]:
        """The shape with the least padding."""
        return -(-self._num_rows // size), *self.hf_tensors[0].shape[1:]

    def accepts(self, shape: Sequence[int], size: int) -> bool:
        smallest = self.local_shape(size)
        return len(shape) == len(smallest) and shape[0] >= smallest[0] and tuple(shape[1:]) == smallest[1:]

    def hf_slices(self, local: Tensor, rank: int, size: int) -> Iterator[HFSlice]:
        start = rank * local.shape[0]
        stop = min(start + local.shape[0], self._num_rows)
        if stop > start:
            yield HFSlice(self.hf_tensors[0].name, _rows(slice(start, stop), local), local[: stop - start])

    def global_slices(self, local: Tensor, rank: int, size: int) -> Iterator[GlobalSlice]:
        """A rank's rows, even if the padding alone fills several ranks."""
        yield GlobalSlice((rank * local.shape[0], *(0,) * (local.dim() - 1)), local)

    def clear_padding(self, local: Tensor, rank: int) -> None:
        filled = min(max(self._num_rows - rank * local.shape[0], 0), local.shape[0])
        local.detach()[filled:].zero_()

    @property
    def _num_rows(self) -> int:
        return self.hf_tensors[0].shape[0]


def vocabulary_rules(shape: ModelShape, embedding: str, output: str) -> list[Rule]:
    """Embedding and output layer; if they are tied, both read the same Hugging Face tensor."""

    def rows(name: str, module: str) -> Rule:
        return VocabularyRows(name, (HFTensor(f"{module}.weight", (shape.vocab_size, shape.hidden_size)),))

    output = embedding if shape.tied_embeddings else output
    return [rows("embedding.word_embeddings.weight", embedding), rows("output_layer.weight", output)]


def expected_tensors(rules: Mapping[str, Rule]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every Hugging Face tensor of the rules."""
    return {tensor.name: tensor.shape for rule in rules.values() for tensor in rule.hf_tensors}


def _nth(rank: int, length: int) -> slice:
    return slice(rank * length, (rank + 1) * length)


def _rows(rows: slice, tensor: Tensor) -> Index:
    return rows, *(slice(None),) * (tensor.dim() - 1)
