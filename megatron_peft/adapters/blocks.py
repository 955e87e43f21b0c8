"""Products of activations with a block-diagonal matrix, and the gradients of its blocks.

    y = x + diag(D) x        contiguous groups of g features, each with its own g x g block of D = R - I

Letters: n tokens (any leading axes), k blocks, g features of a block, r rank.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from megatron_peft.runtime.cpu_kernels import add_outer_sums, outer_sums


def add_blocks(x: Tensor, blocks: Tensor, ready: Tensor | None = None) -> Tensor:  # [..., k g] -> [..., k g]
    """x + diag(blocks) x, one batched product that writes into place; with blocks = R - I this is R x.

    In the blocks' own precision x is multiplied by I + blocks, which spares a pass over x and one over the answer. In a
    lower one the identity part must stay exact: x is copied and the product with the blocks is added to it.

    x: [..., k g].
    blocks: [k, g, g].
    ready: `multiplier(blocks, x.dtype)`, if it is at hand.
    """
    if ready is None or ready.dtype != x.dtype:
        ready = multiplier(blocks, x.dtype)
    if x.dtype == blocks.dtype:
        out, beta = torch.empty_like(x, memory_format=torch.contiguous_format), 0
    else:
        out, beta = x.clone(memory_format=torch.contiguous_format), 1
    grouped(out, blocks).baddbmm_(grouped(x, blocks), ready.transpose(1, 2), beta=beta)
    return out


def multiplier(blocks: Tensor, dtype: torch.dtype) -> Tensor:  # [k, g, g] -> [k, g, g]
    """What activations of this dtype are multiplied by: I + blocks in the blocks' own precision, else the blocks."""
    return blocks + identity_like(blocks) if dtype == blocks.dtype else blocks.to(dtype)


def identity_like(blocks: Tensor) -> Tensor:  # [..., g, g] -> [g, g]
    """The identity, to be read only; made once."""
    return _identity(blocks.shape[-1], blocks.dtype, blocks.device)


@cache
def _identity(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.eye(size, dtype=dtype, device=device)


def blocks_gradient(grad: Tensor, x: Tensor, blocks: Tensor) -> Tensor:  # [..., k g] twice -> [k, g, g]
    """Per-block sum over tokens of grad x^T, in the dtype of `blocks`."""
    return outer_sums(grouped(grad, blocks).transpose(1, 2), grouped(x, blocks), blocks.dtype)


def grouped(x: Tensor, blocks: Tensor) -> Tensor:  # [..., k g] -> [k, n, g], a view where x is contiguous
    """x by the groups of features that the blocks [k, g, g] act on, with the n tokens of x flattened."""
    return x.reshape(-1, *blocks.shape[:2]).transpose(0, 1)


def gradient_from_output(products: Tensor, D: Tensor) -> Tensor:  # [k, g, g] twice -> [k, g, g]
    """dD = g^T z = (g^T y) (I + D) out of g^T y, for an orthogonal I + D: z = (I + D)^T y was not saved."""
    return torch.baddbmm(products, products, D)


def gradient_from_mixed_output(products: Tensor, D: Tensor) -> Tensor:  # [k, g, g] twice -> [k, g, g]
    """dD = g^T z = (g^T y - dB B^T) (I + D)^-T out of the difference: z = (I + D)^-1 (y - B u) is not formed.

    I + D of a mixture, lambda I + (1 - lambda) R, has an inverse unless lambda is 1/2 and R has an eigenvalue of -1.
    """
    solved = torch.linalg.solve_ex(D + identity_like(D), products.transpose(1, 2))  # unchecked: no wait for CUDA
    return solved.result.transpose(1, 2)


def by_block(dB: Tensor, B: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:  # -> [k, g, r], [k, r, g]
    """The factors of dB B^T, block by block, in the precision of the blocks."""
    groups = (*blocks.shape[:2], -1)
    return dB.reshape(groups).to(blocks.dtype), B.reshape(groups).transpose(1, 2).to(blocks.dtype)


@dataclass(frozen=True)
class HeldBlocks:
    """The blocks of one layer, built once a step (`rotation.py`).

    stack: of all layers' blocks, of which these are a part.
    D: [k, g, g] in float32 at least, what the layer applies beyond the identity: a leaf of autograd's graph.
    multiplier: `multiplier(D, dtype)` in the dtype of the layer's activations.
    total: [k, g, g], to which each microbatch's backward adds; None where no backward follows.
    scale: of the low rank beside it; None without one.
    """

    stack: Any
    D: Tensor
    multiplier: Tensor
    total: Tensor | None = None
    scale: Tensor | None = None

    def accumulate(self, grad: Tensor, kept: Tensor, dB: Tensor | None = None, B: Any = None) -> None:
        """total += g^T kept - dB B^T, in the precision of `total`."""
        assert self.total is not None, "the blocks were built for inference"
        add_outer_sums(self.total, grouped(grad, self.total).transpose(1, 2), grouped(kept, self.total))
        if dB is not None:
            self.total.baddbmm_(*by_block(dB, B, self.total), alpha=-1)
