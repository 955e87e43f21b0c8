"""Llama: its config.json in both directions, and the names of its weights.

Mistral and Qwen have Llama's keys and names, with a few of their own: `llama_like`, `llama_like_config` and `WEIGHTS`.
"""

from typing import Any

from megatron_peft.config import require
from megatron_peft.models.families import Family, WeightNames
from megatron_peft.models.shape import MOST_EPSILON, MOST_LAYERS, Config, ModelShape, RopeScaling, number, size, switch

# Keys that change the computation -> the values that do not.
REFUSED: dict[str, tuple[Any, ...]] = {
    "pretraining_tp": (None, 1),
    "hidden_act": (None, "silu"),
    "partial_rotary_factor": (None, 1),
    "rope_interleaved": (None, False),
    "sliding_window": (None,),
    "use_sliding_window": (None, False),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "attention_multiplier": (None,),
    "embedding_multiplier": (None, 1),
    "residual_multiplier": (None, 1),
    "logits_scaling": (None, 1),
    "use_qk_norm": (None, False),
    "num_local_experts": (None, 0),
}
READ_BY_ALL = {  # by `llama_like`
    "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
    "vocab_size", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings",
    "rope_theta", "rope_scaling", "rope_parameters", "original_max_position_embeddings",
}  # fmt: skip
READ = {*READ_BY_ALL, "attention_bias", "mlp_bias"}
ROPE_KEYS = {
    "default": {"rope_theta"},
    "linear": {"rope_theta", "factor"},
    "llama3": {
        "rope_theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings",
    },
}  # fmt: skip


def llama_shape(config: Config) -> ModelShape:
    """ConfigurationError names the key at fault."""
    return llama_like(config, "llama", linear_biases=biases(config, "attention_bias", "mlp_bias"))


def biases(config: Config, *keys: str) -> frozenset[str]:
    """Linear layers that own a bias, from the switches `attention_bias` and `mlp_bias`."""
    layers = {"attention_bias": ("linear_qkv", "linear_proj"), "mlp_bias": ("linear_fc1", "linear_fc2")}
    return frozenset(name for key in keys if switch(config, key) for name in layers[key])


def llama_like(config: Config, architecture: str, **others: Any) -> ModelShape:
    """The shape of a family with Llama's keys; `others` are fields that its own keys set.

    Raises ConfigurationError: names the key at fault.
    """
    heads, hidden = size(config, "num_attention_heads"), size(config, "hidden_size")
    rotary_base, rope_scaling = read_rope(config)
    return ModelShape(
        architecture=architecture,
        num_layers=size(config, "num_hidden_layers", most=MOST_LAYERS),
        hidden_size=hidden,
        ffn_hidden_size=size(config, "intermediate_size"),
        num_attention_heads=heads,
        num_query_groups=size(config, "num_key_value_heads", heads),
        kv_channels=head_dim(config, hidden, heads),
        vocab_size=size(config, "vocab_size"),
        max_position_embeddings=size(config, "max_position_embeddings", 2048),
        norm_epsilon=number(config, "rms_norm_eps", 1e-6, most=MOST_EPSILON),
        tied_embeddings=switch(config, "tie_word_embeddings"),
        rotary_base=rotary_base,
        rope_scaling=rope_scaling,
        **others,
    )


def head_dim(config: Config, hidden: int, heads: int) -> int:
    """Features of an attention head."""
    require(
        config.get("head_dim") is not None or hidden % heads == 0,
        f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}, and head_dim is not given.",
    )
    features = size(config, "head_dim", hidden // heads)
    require(features % 2 == 0, f"head_dim {features} is odd: rotary embeddings rotate pairs of features.")
    return features


def read_rope(config: Config) -> tuple[float, RopeScaling | None]:
    """Base and scaling, from `rope_theta` and `rope_scaling`, or from the newer `rope_parameters` with both."""
    given = config.get("rope_scaling") or config.get("rope_parameters") or {}
    require(isinstance(given, dict), f"rope_scaling is {given!r}, not an object.")
    rope = {key: value for key, value in given.items() if value is not None}
    old_name = rope.pop("type", "default")
    kind = rope.pop("rope_type", old_name)
    theta = number(rope, "rope_theta", number(config, "rope_theta", 10000.0))
    if rope.get("partial_rotary_factor") == 1:
        del rope["partial_rotary_factor"]
    require(
        isinstance(kind, str) and kind in ROPE_KEYS and (kind != "linear" or rope.get("factor") == 1),
        f"rope_type {kind!r} is not supported. Supported: default, llama3. If it only extends the model to longer "
        "texts (as YaRN does Qwen), remove rope_scaling from a copy of the folder's config.json.",
    )
    unknown = sorted(rope.keys() - ROPE_KEYS[kind])
    require(not unknown, f"{', '.join(unknown)} of rope_type {kind!r} is not supported.")
    if kind != "llama3":
        return theta, None
    length = "original_max_position_embeddings"
    trained_length = config.get(length) or rope.get(length) or config.get("max_position_embeddings")
    scaling = RopeScaling(
        factor=number(rope, "factor"),
        low_freq_factor=number(rope, "low_freq_factor"),
        high_freq_factor=number(rope, "high_freq_factor"),
        original_max_position_embeddings=size({length: trained_length}, length),
    )
    require(
        scaling.high_freq_factor > scaling.low_freq_factor,
        f"high_freq_factor {scaling.high_freq_factor} must be above low_freq_factor {scaling.low_freq_factor}.",
    )
    return theta, scaling


def llama_config(shape: ModelShape) -> dict[str, Any]:
    """The inverse of `llama_shape`."""
    return {
        **llama_like_config(shape),
        "attention_bias": "linear_qkv" in shape.linear_biases,
        "mlp_bias": "linear_fc1" in shape.linear_biases,
    }


def llama_like_config(shape: ModelShape) -> dict[str, Any]:
    """The inverse of `llama_like`, without the keys of its `others`."""
    return {
        "hidden_act": "silu",
        "num_hidden_layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.ffn_hidden_size,
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_query_groups,
        "head_dim": shape.kv_channels,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": shape.max_position_embeddings,
        "rms_norm_eps": shape.norm_epsilon,
        "tie_word_embeddings": shape.tied_embeddings,
        "rope_parameters": rope_parameters(shape),
    }


def rope_parameters(shape: ModelShape) -> dict[str, Any]:
    """The inverse of `read_rope`."""
    scaling = {} if shape.rope_scaling is None else vars(shape.rope_scaling)
    return {"rope_type": "llama3" if scaling else "default", "rope_theta": shape.rotary_base, **scaling}


WEIGHTS = WeightNames(
    prefix="model.",
    embedding="embed_tokens",
    final_norm="norm",
    layers="layers",
    input_norm="input_layernorm",
    mlp_norm="post_attention_layernorm",
    linear_qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    linear_proj="self_attn.o_proj",
    linear_fc1=("mlp.gate_proj", "mlp.up_proj"),
    linear_fc2="mlp.down_proj",
)
FAMILY = Family(
    architectures=("LlamaForCausalLM",),
    shape=llama_shape,
    config=llama_config,
    read=READ,
    refused=REFUSED,
    weights=WEIGHTS,
)
