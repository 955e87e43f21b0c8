"""megatron-core's self-attention with a key-value cache that holds what a step of generation reads, as it reads it.

Its own forward keeps keys as the linear layer gave them and applies the rotary embedding to the whole cache at every
token. A key's position never changes, so here it is turned once, before it enters the cache. And the positions of a
head lie side by side. The numbers are the same, bit for bit. Without a cache nothing differs.

Letters: s new positions, b batch, n heads a rank, g key-value heads a rank, d features of a head, p positions.
"""

from functools import lru_cache
from typing import Any

import torch
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor


class CachingSelfAttention(SelfAttention):
    """Self-attention for training, and for generation with a static cache."""

    def _allocate_memory(
        self, inference_max_sequence_length: int, batch_size: int, dim: int, dtype: torch.dtype
    ) -> Tensor:
        """A cache [p, b, g, d] in the memory of [b, g, p, d]."""
        size = batch_size, self.num_query_groups_per_partition, inference_max_sequence_length, dim
        return torch.empty(size, dtype=dtype, device=torch.cuda.current_device()).permute(2, 0, 1, 3)

    def _adjust_key_value_for_inference(
        self,
        inference_context: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rotary_pos_emb: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """What attention goes on with; megatron-core calls it between the linear layer and the rotary embedding.

        Args:
            inference_context: a static cache, or None.
            query: [s, b, n, d].
            key, value: [s, b, g, d].
            rotary_pos_emb: angles of queries and of keys, [p, 1, 1, d] each; None where positions are told otherwise.
        """
        if inference_context is not None and rotary_pos_emb is not None:
            first = inference_context.sequence_len_offset
            waves = _waves(rotary_pos_emb[0], first, first + len(key), key.dtype)  # of queries and keys alike
            query, key = _turned(torch.cat([query, key], dim=2), *waves).split([query.shape[2], key.shape[2]], dim=2)
            rotary_pos_emb = None
        go_on: Any = super()._adjust_key_value_for_inference  # its types deny the None that it takes
        return go_on(inference_context, query, key, value, rotary_pos_emb, *args, **kwargs)


@lru_cache(maxsize=1)
def _waves(angles: Tensor, first: int, end: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of some positions, [s, 1, 1, d], the first half of sin negated. Every layer asks for the same."""
    cos, sin = angles[first:end].cos(), angles[first:end].sin()
    low, high = sin.chunk(2, dim=-1)
    return cos.to(dtype), torch.cat([-low, high], dim=-1).to(dtype)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[x1 cos - x2 sin, x2 cos + x1 sin] of the two halves of a head: [s, b, n, d] -> [s, b, n, d]."""
    return (x * cos).add_(x.roll(x.shape[-1] // 2, -1).mul_(sin))
