"""ALiBi, attention with linear biases: the further a key lies behind the query, the less its score counts.

    score(i, j) = q_i k_j / sqrt(d) - slope_n (i - j)          slope_n: of head n

Bloom and transformers add slope_n j instead, which the softmax cannot tell apart. In bfloat16 a distance is exact up to
256 and keeps three digits beyond; slope_n j at position 2,000 would be off by several steps for neighbouring keys.

Letters: s queries, k keys, b batch, n heads of this rank, g key-value heads of this rank, d features of a head.
"""

from typing import Any

import torch
from torch import Tensor

from megatron_peft.models.attention import ScaledDotProductAttention

_GROWTH = 128  # positions


def alibi_slopes(num_heads: int) -> Tensor:
    """[num_heads], float32, of the whole model: 2^(-8 i / m) for a power of two m, i from 1.

    Heads beyond the largest power of two take every other slope of a model of 2 m heads, as in the paper's code.
    """
    m = 2 ** (num_heads.bit_length() - 1)
    exponents = [i / m for i in range(1, m + 1)]
    exponents += [(2 * i - 1) / (2 * m) for i in range(1, num_heads - m + 1)]
    return torch.tensor([2.0 ** (-8 * exponent) for exponent in exponents], dtype=torch.float32, device="cpu")


class AlibiBias:
    """What is added to the scores of a rank's heads, -inf where a key comes after the query.

    All layers share one object: the bias of the longest sequence so far is kept, and every shorter one, and the later
    queries of a key-value cache, are a slice of it.

    Args:
        num_heads: of the whole model.
        rank, size: tensor-parallel; the heads are split evenly.
    """

    def __init__(self, num_heads: int, rank: int, size: int) -> None:
        self._slopes = alibi_slopes(num_heads).chunk(size)[rank][:, None, None]
        self._square: Tensor | None = None

    def of(self, num_queries: int, num_keys: int, query: Tensor) -> Tensor:
        """[n, s, k] in the type and on the device of `query`; the queries are the last of the keys' positions."""
        if num_queries == 1:  # a step of generation: not worth a square
            return self._rows(num_keys - 1, num_keys, query)
        kept = self._square
        if kept is None or kept.shape[-1] < num_keys or (kept.dtype, kept.device) != (query.dtype, query.device):
            kept = self._square = self._rows(0, -(-num_keys // _GROWTH) * _GROWTH, query)
        return kept[:, num_keys - num_queries : num_keys, :num_keys]

    def _rows(self, first_query: int, num_keys: int, query: Tensor) -> Tensor:
        """Queries `first_query` to `num_keys` - 1."""
        position = torch.arange(num_keys, device=query.device, dtype=torch.float32)
        distance = position - position[first_query:, None]
        distance.masked_fill_(distance > 0, -torch.inf)
        return (self._slopes.to(query.device) * distance).to(query.dtype)


class AlibiAttention(ScaledDotProductAttention):
    """The core attention with ALiBi. Arguments as for its parent, and the bias that the layers share."""

    def __init__(self, *args: Any, bias: AlibiBias, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._bias = bias

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        bias = self._bias.of(query.shape[2], key.shape[2], query).unsqueeze(0)
        if mask is not None:
            bias = bias + mask
        return super()._attend(query, key, value, bias)
