"""Qwen2 and Qwen2.5: their config.json in both directions. A Llama with biases on q, k and v, and on no other layer.

Small ones have tied embeddings. A window (`use_sliding_window`) is only in the layers from `max_window_layers` on.
"""

from typing import Any

from megatron_peft.config import require
from megatron_peft.models.families import Family
from megatron_peft.models.llama import READ_BY_ALL, WEIGHTS, llama_like, llama_like_config
from megatron_peft.models.shape import MOST_LAYERS, Config, ModelShape, size, switch

# What transformers takes for an absent key.
DEFAULTS = {
    "num_key_value_heads": 32, "max_position_embeddings": 32768, "sliding_window": 4096, "max_window_layers": 28,
}  # fmt: skip
WINDOW_KEYS = {"use_sliding_window", "sliding_window", "max_window_layers", "layer_types"}
REFUSED: dict[str, tuple[Any, ...]] = {"hidden_act": (None, "silu"), "use_mrope": (None, False)}


def qwen2_shape(config: Config) -> ModelShape:
    """ConfigurationError names the key at fault."""
    config = {**DEFAULTS, **config}
    return llama_like(config, "qwen2", linear_biases=frozenset({"linear_qkv"}), **read_window(config))


def read_window(config: Config) -> dict[str, Any]:
    """`sliding_window` and `num_full_attention_layers`, of a config with transformers' defaults."""
    num_layers = size(config, "num_hidden_layers", most=MOST_LAYERS)
    num_full = _num_full_attention_layers(config, num_layers)
    if num_full == num_layers:
        return {}
    return {"sliding_window": size(config, "sliding_window"), "num_full_attention_layers": num_full}


def _num_full_attention_layers(config: Config, num_layers: int) -> int:
    """What `max_window_layers` says, or `layer_types`, which newer files have for each layer."""
    has_window = switch(config, "use_sliding_window") and config["sliding_window"] is not None
    kinds = config.get("layer_types")
    if kinds is None:
        first = config["max_window_layers"]
        return min(num_layers, first and size(config, "max_window_layers")) if has_window else num_layers
    require(
        isinstance(kinds, list) and len(kinds) == num_layers,
        f"layer_types is {str(kinds)[:40]}, not a list of {num_layers} names.",
    )
    num_full = next((n for n, kind in enumerate(kinds) if kind != "full_attention"), num_layers)
    require(
        all(kind == "sliding_attention" for kind in kinds[num_full:]) and (has_window or num_full == num_layers),
        "layer_types must be full_attention, up to the first sliding_attention, which needs use_sliding_window and "
        f"sliding_window; it is {', '.join(map(str, kinds))[:80]}.",
    )
    return num_full


def qwen2_config(shape: ModelShape) -> dict[str, Any]:
    """The inverse of `qwen2_shape`."""
    return {**llama_like_config(shape), **window_config(shape)}


def window_config(shape: ModelShape) -> dict[str, Any]:
    """The inverse of `read_window`."""
    if shape.sliding_window is None:
        return {"use_sliding_window": False}
    return {
        "use_sliding_window": True,
        "sliding_window": shape.sliding_window,
        "max_window_layers": shape.num_full_attention_layers,
    }


FAMILY = Family(
    architectures=("Qwen2ForCausalLM",),
    shape=qwen2_shape,
    config=qwen2_config,
    read={*READ_BY_ALL, *WINDOW_KEYS},
    refused=REFUSED,
    weights=WEIGHTS,
)
