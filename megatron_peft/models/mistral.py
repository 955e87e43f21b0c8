"""Mistral (7B, Nemo, Small, ...): its config.json in both directions. Weights are named as Llama's; no biases.

Mistral 7B v0.1 has a sliding window of 4,096 tokens in every layer; later ones have none (`sliding_window: null`). Nemo
and Small have heads of 128 features that are not hidden size / heads.
"""

from typing import Any

from megatron_peft.models.families import Family
from megatron_peft.models.llama import READ_BY_ALL, WEIGHTS, llama_like, llama_like_config
from megatron_peft.models.shape import Config, ModelShape, size

# What transformers takes for an absent key. null is another value: no window, or as many key-value heads as heads.
DEFAULTS = {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096}


def mistral_shape(config: Config) -> ModelShape:
    """ConfigurationError names the key at fault."""
    config = {**DEFAULTS, **config}
    window = None if config["sliding_window"] is None else size(config, "sliding_window")
    return llama_like(config, "mistral", sliding_window=window)


def mistral_config(shape: ModelShape) -> dict[str, Any]:
    """The inverse of `mistral_shape`."""
    return {**llama_like_config(shape), "sliding_window": shape.sliding_window}


FAMILY = Family(
    architectures=("MistralForCausalLM",),
    shape=mistral_shape,
    config=mistral_config,
    read={*READ_BY_ALL, "sliding_window"},
    refused={"hidden_act": (None, "silu"), "layer_types": (None,)},
    weights=WEIGHTS,
)
