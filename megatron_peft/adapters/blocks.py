"""Products of activations with a block-diagonal matrix: contiguous groups of features, each with its own g x g block.

Letters: n tokens (any leading axes), k blocks, g features of a block.
"""

from functools import cache

import torch
from torch import Tensor

CACHED_TOKENS = 128


def add_blocks(x: Tensor, blocks: Tensor) -> Tensor:  # [..., k g], [k, g, g] -> [..., k g]
    """x + diag(blocks) x, one batched product that writes into place; with blocks = R - I this is R x.

    In the blocks' own precision x is multiplied by I + blocks, which spares a pass over x and one over the answer. In a
    lower one the identity part must stay exact: x is copied and the product with the blocks is added to it.
    """
    if x.dtype == blocks.dtype:
        out, beta = torch.empty_like(x, memory_format=torch.contiguous_format), 0
        blocks = blocks + identity_like(blocks)
    else:
        out, beta = x.clone(memory_format=torch.contiguous_format), 1
    grouped(out, blocks).baddbmm_(grouped(x, blocks), blocks.to(x.dtype).transpose(1, 2), beta=beta)
    return out


def turn_rows(weight: Tensor, blocks: Tensor) -> Tensor:  # [k g, in], [k, g, g] -> [k g, in]
    """(I + diag(blocks)) W: a copy of the weight with its rows turned."""
    return torch.bmm(blocks + identity_like(blocks), weight.view(*blocks.shape[:2], -1)).view_as(weight)


def identity_like(blocks: Tensor) -> Tensor:  # [..., g, g] -> [g, g]
    """The identity, to be read only; made once."""
    return _identity(blocks.shape[-1], blocks.dtype, blocks.device)


@cache
def _identity(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.eye(size, dtype=dtype, device=device)


def blocks_gradient(grad: Tensor, x: Tensor, blocks: Tensor) -> Tensor:  # [..., k g] twice -> [k, g, g]
    """sum over tokens of grad x^T by block, in the blocks' own type.

    On a CPU in pieces of the tokens that stay in its cache: a block's columns lie far apart, and of wide layers (k g of
    3,072) the whole takes half as long again.
    """
    grad, x = grouped(grad, blocks).transpose(1, 2), grouped(x, blocks)
    if grad.is_cuda or grad.dtype != blocks.dtype:  # one launch; one rounding
        return torch.bmm(grad, x).to(blocks.dtype)
    total = torch.zeros_like(blocks)
    for some_grad, some_x in zip(grad.split(CACHED_TOKENS, 2), x.split(CACHED_TOKENS, 1), strict=True):
        total.baddbmm_(some_grad, some_x)
    return total


def grouped(x: Tensor, blocks: Tensor) -> Tensor:  # [..., k g] -> [k, n, g], a view where x is contiguous
    return x.reshape(-1, *blocks.shape[:2]).transpose(0, 1)
