"""Core attention on torch's scaled_dot_product_attention: causal, grouped queries, key masks, packed sequences.

megatron-core's own `DotProductAttention` materialises the scores, refuses packing and any bias. Ours takes the same
arguments, so it goes into the same place of the layer spec. ALiBi is a subclass, in alibi.py.

Letters: s (query) sequence, k (key) sequence, b batch, n heads a rank, g key-value heads a rank, d features of a head.
"""

import math
from contextlib import nullcontext
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class ScaledDotProductAttention(MegatronModule):
    """softmax(q k^T / sqrt(d)) v with a causal mask.

    `attention_mask` follows Megatron: True hides a key from a query, any shape that broadcasts to [b, n, s, k]. It is
    applied on top of the causal mask. Queries are the last s of the k positions, so a key-value cache needs no more.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config)
        assert config.kv_channels is not None
        self.softmax_scale = softmax_scale or 1 / math.sqrt(config.kv_channels)
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            query: [s, b, n, d]; packed: [tokens, n, d].
            key, value: [k, b, g, d]; packed: [tokens, g, d].
            attention_mask: True hides; None for a causal mask alone.
            attention_bias: not served.
            packed_seq_params: sequence boundaries of the packed form.

        Returns:
            [s, b, n d]; packed: [tokens, 1, n d].
        """
        assert attention_bias is None, "GPTModel passes no attention bias"
        if packed_seq_params is not None:
            return self._attend_packed(query, key, value, packed_seq_params)
        mask = _hiding(query.shape[0], key.shape[0], attention_mask, query.dtype)
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        context = self._attend(query, key, value, mask)
        return context.permute(2, 0, 1, 3).flatten(2)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """[b, n, s, d], [b, g, k, d] twice -> [b, n, s, d].

        `mask` broadcasts to [b, n, s, k] and is added to the scores. None: causal.
        """
        shape, is_causal = query.shape, mask is None and query.shape[2] > 1
        if query.shape[2] == 1:
            query, mask = (_by_key_head(x, key.shape[1]) for x in (query, mask))
        dropout = self.dropout if self.training else 0.0
        # Heads are split over the tensor-parallel ranks: each drops its own.
        tracker = tensor_parallel.get_cuda_rng_tracker()
        generator = tracker.fork() if dropout and tracker else nullcontext()
        with generator:
            context = F.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=mask,
                dropout_p=dropout,
                is_causal=is_causal,
                scale=self.softmax_scale,
                enable_gqa=query.shape[1] != key.shape[1],
            )
        return context.reshape(shape)

    def _attend_packed(self, query: Tensor, key: Tensor, value: Tensor, packing: PackedSeqParams) -> Tensor:
        """Each sample by itself: no score between two samples is ever computed. [t, n, d] -> [t, 1, n d]"""
        lengths = packing.cu_seqlens_q.diff().tolist()
        samples = zip(*(x.split(lengths) for x in (query, key, value)), strict=True)
        contexts = [
            self._attend(*(x.transpose(0, 1).unsqueeze(0) for x in sample)).squeeze(0).transpose(0, 1)
            for sample in samples
        ]
        return torch.cat(contexts).flatten(1).unsqueeze(1)


def _by_key_head(x: Any, num_key_heads: int) -> Any:
    """[b, n, 1, ...] -> [b, g, n / g, ...]: the heads of a group as queries of the key head that they share.

    So keys and values of a step of generation are read once a group. What is common to all heads stays.
    """
    if x is None or x.shape[1] == 1:
        return x
    return x.squeeze(2).unflatten(1, (num_key_heads, -1))


@lru_cache(maxsize=1)
def _hiding(num_queries: int, num_keys: int, attention_mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """0 where a query may look, -inf elsewhere, [..., s, k]; None where the plain causal mask (or none) says the same.

    A query always sees its own key, so that a padded position has something to attend to and stays finite.

    The last answer is remembered: the layers of a model ask one after the other, with the same tensor.
    """
    if attention_mask is None and (num_queries == num_keys or num_queries == 1):
        return None
    device = attention_mask.device if attention_mask is not None else torch.device(torch.cuda.current_device())
    causal = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device).tril(num_keys - num_queries)
    visible = causal
    if attention_mask is not None:
        own = causal & ~causal.tril(num_keys - num_queries - 1)
        visible = causal & ~attention_mask | own
    return torch.zeros(visible.shape, dtype=dtype, device=device).masked_fill_(~visible, -torch.inf)
