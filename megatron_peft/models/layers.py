"""The modules of a layer beside its linear layers: core attention with its cache, norms and SwiGLU, on any device.

Attention is torch's scaled_dot_product_attention: megatron-core's own `DotProductAttention` materializes the scores and
supports neither packing nor a bias. Ours takes the same arguments, so it fits the same place of the layer spec.

Letters, of one rank: s queries, k keys, b batch, n heads, g key-value heads, d features of a head.
"""

import math
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_peft.adapters.frozen_linear import run_function
from megatron_peft.models.kernels import causal_varlen_attention
from megatron_peft.runtime.cpu_kernels import RootMeanSquareNorm

# --attention-backend -> torch's kernels, the preferred first. A kernel that cannot serve a call (a mask, a dtype, the
# device) is passed over: for that, the one that computes all scores stands last.
_FUSED = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
_KERNELS = {
    "flash": [*_FUSED, SDPBackend.MATH],
    "fused": [*_FUSED[1:], _FUSED[0], SDPBackend.MATH],  # Megatron's meaning: cuDNN's
    "unfused": [SDPBackend.MATH],
    "local": [SDPBackend.MATH],
}


@dataclass
class PackedSamples(PackedSeqParams):
    """Several samples in one row, in megatron-core's form, with what our modules would else ask the device for."""

    lengths: tuple[int, ...] = ()  # of the samples in tokens, on the host
    position_ids: Tensor | None = None  # int64 [tokens], of each token in its sample, on the device

    @classmethod
    def of(cls, cu_seqlens: Tensor, lengths: tuple[int, ...], position_ids: Tensor) -> "PackedSamples":
        """The samples that the fields of a `Microbatch` describe."""
        return cls(
            qkv_format="thd",
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            max_seqlen_q=max(lengths),
            max_seqlen_kv=max(lengths),
            lengths=lengths,
            position_ids=position_ids.flatten(),
        )


class ScaledDotProductAttention(MegatronModule):
    """softmax(q k^T / sqrt(d)) v with a causal mask. The queries are the last s of the k positions."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        **unused: Any,
    ) -> None:
        super().__init__(config=config)
        assert config.kv_channels is not None
        self.softmax_scale = softmax_scale or 1 / math.sqrt(config.kv_channels)
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self._kernels = _KERNELS.get(getattr(config, "attention_kernel", "auto"))

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSamples | None = None,
    ) -> Tensor:
        """[s, b, n, d], [k, b, g, d] twice -> [s, b, n d]; packed: [tokens, n, d], [tokens, g, d] -> [tokens, 1, n d].

        As Megatron's, `attention_mask` is True where a key is hidden from a query, on top of the causal mask, and
        broadcasts to [b, n, s, k]. None: causal only.
        """
        assert attention_bias is None, "GPTModel passes no attention bias"
        if packed_seq_params is not None:
            return self._attend_packed(query, key, value, packed_seq_params)
        mask = _additive_mask(query.shape[0], key.shape[0], attention_mask, query.dtype)
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        context = self._attend(query, key, value, mask)
        return context.permute(2, 0, 1, 3).flatten(2)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """[b, n, s, d], [b, g, k, d] twice -> [b, n, s, d]. `mask` is added to the scores. None: causal."""
        shape, is_causal = query.shape, mask is None and query.shape[2] > 1
        if query.shape[2] == 1:
            query, mask = (_group_by_key_head(x, key.shape[1]) for x in (query, mask))
        dropout = self.dropout if self.training else 0.0
        # Heads are split over the tensor-parallel ranks, so each rank draws its own dropout. With the sequence split
        # megatron-core's block has taken the rank's generator already: taken twice, recompute would draw other masks.
        tracker = tensor_parallel.get_cuda_rng_tracker()
        is_alone = not self.config.sequence_parallel
        generator = tracker.fork() if dropout and tracker and is_alone else nullcontext()
        kernels = sdpa_kernel(self._kernels, set_priority=True) if self._kernels else nullcontext()
        with generator, kernels:
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

    def _attend_packed(self, query: Tensor, key: Tensor, value: Tensor, packing: PackedSamples) -> Tensor:
        """No score between two samples is computed. [tokens, n, d] -> [tokens, 1, n d].

        On a GPU one kernel takes all samples (`kernels.require_packed_attention` has made sure of it), on a CPU one
        sample follows another.
        """
        if query.is_cuda:
            attend = causal_varlen_attention()
            assert attend is not None
            context = attend(
                *(query, key, value, packing.cu_seqlens_q, packing.cu_seqlens_kv),
                *(packing.max_seqlen_q, packing.max_seqlen_kv),
                scale=self.softmax_scale,
            )
            return context.flatten(1).unsqueeze(1)
        samples = zip(*(x.split(packing.lengths) for x in (query, key, value)), strict=True)
        contexts = [
            self._attend(*(x.transpose(0, 1).unsqueeze(0) for x in sample)).squeeze(0).transpose(0, 1)
            for sample in samples
        ]
        return torch.cat(contexts).flatten(1).unsqueeze(1)


def _group_by_key_head(x: Any, num_key_heads: int) -> Any:
    """[b, n, 1, ...] -> [b, g, n / g, ...]: the heads of a group become queries of the key head that they share.

    A decoding step then reads keys and values once per group. A mask that all heads share is returned as it is.
    """
    if x is None or x.shape[1] == 1:
        return x
    return x.squeeze(2).unflatten(1, (num_key_heads, -1))


@lru_cache(maxsize=1)
def _additive_mask(num_queries: int, num_keys: int, attention_mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """0 where a query sees a key, else -inf, [..., s, k]; None if a plain causal mask (or no mask) is enough.

    The last result is cached, because every layer of a model calls this with the same tensor.
    """
    if attention_mask is None and (num_queries == num_keys or num_queries == 1):
        return None
    device = attention_mask.device if attention_mask is not None else torch.device(torch.cuda.current_device())
    causal = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device).tril(num_keys - num_queries)
    visible = causal
    if attention_mask is not None:
        # A query always sees its own key: a padded position has something to attend to and stays finite.
        own = causal & ~causal.tril(num_keys - num_queries - 1)
        visible = causal & ~attention_mask | own
    return torch.zeros(visible.shape, dtype=dtype, device=device).masked_fill_(~visible, -torch.inf)


# ALiBi (attention with linear biases, arXiv:2108.12409): score(i, j) = q_i k_j / sqrt(d) - slope_n (i - j) for head n.
#
# Bloom and transformers add slope_n j instead; the softmax is the same. Distances are more precise in bfloat16: exact
# up to 256, while near position 2,000 slope_n j rounds to the same number for neighboring keys.

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
    """The bias of the scores of a rank's heads, -inf where a key comes after the query.

    All layers share one object. It caches the bias of the longest sequence so far; any other is a slice of it.
    """

    def __init__(self, num_heads: int, rank: int, size: int) -> None:  # heads of the model, split evenly over the ranks
        self._slopes = alibi_slopes(num_heads).chunk(size)[rank][:, None, None]
        self._square: Tensor | None = None

    def get(self, num_queries: int, num_keys: int, query: Tensor) -> Tensor:
        """[n, s, k] in the dtype and on the device of `query`; the queries are the last of the keys' positions."""
        if num_queries == 1:  # a decoding step: one row is cheaper than a square
            return self._rows(num_keys - 1, num_keys, query)
        bias = self._square
        if bias is None or bias.shape[-1] < num_keys or (bias.dtype, bias.device) != (query.dtype, query.device):
            bias = self._square = self._rows(0, -(-num_keys // _GROWTH) * _GROWTH, query)
        return bias[:, num_keys - num_queries : num_keys, :num_keys]

    def _rows(self, first_query: int, num_keys: int, query: Tensor) -> Tensor:
        """Queries `first_query` to `num_keys` - 1."""
        position = torch.arange(num_keys, device=query.device, dtype=torch.float32)
        distance = position - position[first_query:, None]
        distance.masked_fill_(distance > 0, -torch.inf)
        return (self._slopes.to(query.device) * distance).to(query.dtype)


class AlibiAttention(ScaledDotProductAttention):
    """Core attention with ALiBi. Arguments as for its parent, and the bias that all layers share."""

    def __init__(self, *args: Any, bias: AlibiBias, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._bias = bias

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        bias = self._bias.get(query.shape[2], key.shape[2], query).unsqueeze(0)
        if mask is not None:
            bias = bias + mask
        return super()._attend(query, key, value, bias)


class CachingSelfAttention(SelfAttention):
    """megatron-core's self-attention with other rotary embeddings and another key-value cache; the numbers are the
    same, bit for bit.

    megatron-core computes cosines and sines anew for queries and keys of every layer, and asks the device where packed
    samples begin. Here they are made once for all layers, from the position of each token in its sample. With
    `apply_rope_fusion` Transformer Engine's kernels do it.

    megatron-core caches keys before the rotary embedding and rotates the whole cache for every token. Here a key is
    rotated once, before it enters the cache.
    """

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        hidden_states: Tensor,
        attention_mask: Any,
        *args: Any,
        rotary_pos_emb: Any = None,
        packed_seq_params: PackedSamples | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend like megatron-core's. The angles of packed samples are those of each token, not of each position."""
        if packed_seq_params is not None and rotary_pos_emb is not None and not self.config.apply_rope_fusion:
            rotary_pos_emb = _angles_at(rotary_pos_emb, packed_seq_params.position_ids)
        passed_on = {"rotary_pos_emb": rotary_pos_emb, "packed_seq_params": packed_seq_params}
        return super().forward(hidden_states, attention_mask, *args, **passed_on, **kwargs)

    def _allocate_memory(
        self, inference_max_sequence_length: int, batch_size: int, dim: int, dtype: torch.dtype
    ) -> Tensor:
        """A cache [k, b, g, d]; the positions of a head are contiguous in memory."""
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
        """megatron-core calls this between the linear layer and the rotary embedding. query: [s, b, n, d]; key, value:
        [s, b, g, d]; rotary_pos_emb: angles of queries and of keys, [k, 1, 1, d] each, or None.
        """
        caches = inference_context is not None
        if rotary_pos_emb is not None and (caches or not self.config.apply_rope_fusion):
            first = inference_context.sequence_len_offset if caches else 0
            cos_sin = _cos_sin(rotary_pos_emb[0], first, first + len(key), key.dtype)  # the same for queries and keys
            if caches:  # a step of generation is bound by its number of kernels
                both, sizes = torch.cat([query, key], dim=2), [query.shape[2], key.shape[2]]
                query, key = _rotate(both, *cos_sin).split(sizes, dim=2)
            else:
                query, key = (_rotate(x, *cos_sin) for x in (query, key))
            rotary_pos_emb = None
        adjust: Any = super()._adjust_key_value_for_inference  # its annotations omit the None that it accepts
        return adjust(inference_context, query, key, value, rotary_pos_emb, *args, **kwargs)


@lru_cache(maxsize=1)
def _angles_at(angles: Tensor, position_ids: Tensor) -> Tensor:
    """Row `position_ids[t]` of the angles for token t, [t, 1, 1, d]; for all layers of a microbatch."""
    return angles.index_select(0, position_ids)


@lru_cache(maxsize=1)
def _cos_sin(angles: Tensor, first: int, end: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of positions `first` to `end` - 1, [s, 1, 1, d], the first half of sin negated; for all layers."""
    cos, sin = angles[first:end].cos(), angles[first:end].sin()
    low, high = sin.chunk(2, dim=-1)
    return cos.to(dtype), torch.cat([-low, high], dim=-1).to(dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[x1 cos - x2 sin, x2 cos + x1 sin] of the two halves of a head: [s, b, n, d] -> [s, b, n, d]."""
    return (x * cos).add_(x.roll(x.shape[-1] // 2, -1).mul_(sin))


# megatron-core's `WrappedTorchNorm` refuses sequence parallelism, and its other norms need Transformer Engine or Apex.
#
# Letters: s sequence, b batch, h hidden, f a rank's own feed-forward features.


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis; statistics in float32."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = _norm_parameter(config, hidden_size, 1.0)

    def forward(self, x: Tensor) -> Tensor:  # [s, b, h] -> [s, b, h]
        if x.is_cuda:  # where torch's is one kernel
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return run_function(RootMeanSquareNorm, x, self.weight, self.eps)


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(var + eps) * weight + bias over the last axis."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = _norm_parameter(config, hidden_size, 1.0)
        self.bias = _norm_parameter(config, hidden_size, 0.0)

    def forward(self, x: Tensor) -> Tensor:  # [s, b, h] -> [s, b, h]
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


def _norm_parameter(config: TransformerConfig, hidden_size: int, value: float) -> nn.Parameter:
    device = torch.cuda.current_device()
    parameter = nn.Parameter(torch.full((hidden_size,), value, dtype=config.params_dtype, device=device))
    # Under sequence parallelism a rank sees its own tokens only: megatron-core sums the gradients of marked parameters.
    parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    return parameter


class SwiGLU(MegatronModule):
    """y = silu(gate) * up, x = [gate, up]: the activation of megatron-core's MLP.

    A module, because megatron-core from 0.19 on accepts nothing else there; a MegatronModule, because it calls
    `sharded_state_dict` on every child of the MLP.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        assert config.gated_linear_unit and config.activation_func is F.silu
        assert config.activation_func_clamp_value is None and config.glu_linear_offset == 0

    def forward(self, x: Tensor) -> Tensor:  # [s, b, 2 f] -> [s, b, f]
        return run_function(_SwiGLU, x)


def _recompute_swiglu(ctx: Any) -> Tensor:
    """y; silu(gate) is cached for the function's own backward, which runs next."""
    gate, up = ctx.saved_tensors[0].chunk(2, dim=-1)
    ctx.activated = F.silu(gate)
    return ctx.activated * up


class _SwiGLU(torch.autograd.Function):
    """Saves x only; values and gradients are those of megatron-core's four operators, bit for bit.

    Those also save silu(gate) and a copy of `up`, and concatenate the two halves of the gradient.
    """

    @staticmethod
    def forward(ctx, x):  # type: ignore[override]
        ctx.save_for_backward(x)
        ctx.activated = None
        ctx.recompute_output = _recompute_swiglu  # consumers recompute y instead of saving it
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        (x,) = ctx.saved_tensors
        gate, up = x.chunk(2, dim=-1)
        grad_x = torch.empty_like(x)
        grad_gate, grad_up = grad_x.chunk(2, dim=-1)
        activated = F.silu(gate) if ctx.activated is None else ctx.activated
        ctx.activated = None
        torch.mul(grad, activated, out=grad_up)
        grad_activated = torch.mul(grad, up, out=activated)  # reuses its memory
        torch.ops.aten.silu_backward.grad_input(grad_activated, gate, grad_input=grad_gate)
        return grad_x
