"""How a linear layer's global matrix is split over tensor-parallel ranks; adapters derive their shapes from it."""

import hashlib
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_peft.config import LinearSizes, Side

PARTIAL_OVER_TENSOR_PARALLEL = "partial_over_tensor_parallel"


@dataclass(frozen=True, init=False)
class LinearLayout(LinearSizes):
    """The split of a linear layer over the tensor-parallel ranks of `group`, of which this process is one."""

    group: dist.ProcessGroup

    def __init__(
        self,
        split: Literal["column", "row"],
        out_features: int,
        in_features: int,
        group: dist.ProcessGroup,
        num_parts: int = 1,
        head_features: int | None = None,
    ) -> None:
        super().__init__(split, out_features, in_features, group.size(), num_parts, head_features)
        object.__setattr__(self, "group", group)  # the sizes are frozen

    def slice_output(self, whole: Tensor) -> Tensor:
        """This rank's rows of a tensor over the output features: [out, ...] -> [local out, ...]."""
        if self.split == "row":
            return whole
        parts = whole.unflatten(0, (self.num_parts, self.group.size(), -1))
        return parts[:, self.group.rank()].flatten(0, 1)

    def slice_input(self, whole: Tensor) -> Tensor:
        """This rank's columns of a tensor over the input features: [..., in] -> [..., local in]."""
        if self.split == "column":
            return whole
        return whole.unflatten(-1, (self.group.size(), -1))[..., self.group.rank(), :]

    def num_global(self, module: nn.Module) -> int:
        """Size of a module's parameters over all ranks; replicated ones count once."""
        return sum(
            parameter.numel() * (self.group.size() if parameter.tensor_model_parallel else 1)  # pyright: ignore[reportAttributeAccessIssue]
            for parameter in module.parameters()
        )

    def slice_groups(self, side: Side, whole: Tensor) -> Tensor:
        """This rank's groups of a tensor over all groups of a side's features: [groups, ...] -> [local groups, ...]."""
        if side == "output":
            return self.slice_output(whole)
        return whole if self.split == "column" else whole.chunk(self.group.size())[self.group.rank()]

    def mark_groups(self, side: Side, parameter: Tensor) -> None:
        """`mark_output` for a parameter over the groups of a side, [local groups, ...]."""
        if side == "output":
            self.mark_output(parameter)
        else:
            _mark_adapter(parameter, axis=0 if self.split == "row" else None, stride=1)

    def mark_output(self, parameter: Tensor) -> None:
        """Mark how `parameter` [local out, ...] is split, for the optimizer and the gradient sums."""
        _mark_adapter(parameter, axis=0 if self.split == "column" else None, stride=self.num_parts)

    def mark_input(self, parameter: Tensor) -> None:
        """The same for `parameter` [..., local in]."""
        _mark_adapter(parameter, axis=parameter.ndim - 1 if self.split == "row" else None, stride=1)

    def mark_whole(self, parameter: Tensor) -> None:
        """The same for a `parameter` that every rank holds whole, over neither side's features."""
        _mark_adapter(parameter, axis=None, stride=1)


def mark_split(parameter: Tensor, axis: int | None, stride: int = 1) -> None:
    """Set megatron-core's attributes of a tensor-parallel parameter.

    axis: the split dimension; None: every rank holds the whole parameter, and norms count it once.
    stride: matrices stacked along the axis, each of them split.
    """
    parameter.tensor_model_parallel = axis is not None  # type: ignore[attr-defined]
    parameter.partition_dim = -1 if axis is None else axis  # type: ignore[attr-defined]
    parameter.partition_stride = stride  # type: ignore[attr-defined]


def _mark_adapter(parameter: Tensor, axis: int | None, stride: int) -> None:
    """`mark_split`; a replicated parameter's gradient is a partial sum on each rank."""
    mark_split(parameter, axis, stride)
    setattr(parameter, PARTIAL_OVER_TENSOR_PARALLEL, axis is None)


def generator_for(seed: int, name: str) -> torch.Generator:
    """A CPU generator seeded by (seed, name). Draw the global tensor, then slice it: the layout changes no value."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
