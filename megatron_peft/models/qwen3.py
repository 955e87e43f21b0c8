"""Qwen3, dense: its config.json in both directions, and its norms of queries and keys. Its experts are another family.

Each head of q and k is normalized before the rotary embedding, with one weight for all heads of a layer: a
tensor-parallel rank holds a copy of it and has the gradient of its own heads, and megatron-core sums those. Heads have
128 features, whatever the hidden size; small models have tied embeddings.
"""

from dataclasses import replace
from typing import Any

from megatron_peft.models.families import Family
from megatron_peft.models.llama import READ_BY_ALL, WEIGHTS, biases, llama_like, llama_like_config
from megatron_peft.models.qwen2 import DEFAULTS, REFUSED, WINDOW_KEYS, read_window, window_config
from megatron_peft.models.shape import Config, ModelShape


def qwen3_shape(config: Config) -> ModelShape:
    """ConfigurationError names the key at fault."""
    config = {**DEFAULTS, "head_dim": 128, **config}
    linear_biases = biases(config, "attention_bias")
    return llama_like(config, "qwen3", qk_layernorm=True, linear_biases=linear_biases, **read_window(config))


def qwen3_config(shape: ModelShape) -> dict[str, Any]:
    """The inverse of `qwen3_shape`."""
    attention_bias = "linear_qkv" in shape.linear_biases
    return {**llama_like_config(shape), **window_config(shape), "attention_bias": attention_bias}


FAMILY = Family(
    architectures=("Qwen3ForCausalLM",),
    shape=qwen3_shape,
    config=qwen3_config,
    read={*READ_BY_ALL, *WINDOW_KEYS, "attention_bias"},
    refused=REFUSED,
    weights=replace(WEIGHTS, query_norm="self_attn.q_norm", key_norm="self_attn.k_norm"),
)
