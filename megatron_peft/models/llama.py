"""Llama: its shape from a `config.json`, and the rules for its weights."""

from collections.abc import Iterator
from typing import Any

from megatron_peft.config import require
from megatron_peft.models.rules import Columns, FusedRows, HFTensor, Replicated, Rule, vocabulary_rules
from megatron_peft.models.shape import MOST_EPSILON, MOST_LAYERS, Config, ModelShape, RopeScaling, number, size, switch

# Keys that change the computation, with the values that leave it as it is.
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
READ = {
    "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
    "vocab_size", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "attention_bias", "mlp_bias",
    "rope_theta", "rope_scaling", "rope_parameters", "original_max_position_embeddings",
}  # fmt: skip
# Linear layers: Megatron's that holds each.
MODULES = {
    "q_proj": "linear_qkv",
    "k_proj": "linear_qkv",
    "v_proj": "linear_qkv",
    "o_proj": "linear_proj",
    "gate_proj": "linear_fc1",
    "up_proj": "linear_fc1",
    "down_proj": "linear_fc2",
}
ROPE_KEYS = {
    "default": {"rope_theta"},
    "linear": {"rope_theta", "factor"},
    "llama3": {
        "rope_theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings",
    },
}  # fmt: skip


def llama_shape(config: Config) -> ModelShape:
    heads, hidden = size(config, "num_attention_heads"), size(config, "hidden_size")
    rope_theta, rope_scaling = _rope(config)
    biased = {"attention_bias": ("linear_qkv", "linear_proj"), "mlp_bias": ("linear_fc1", "linear_fc2")}
    return ModelShape(
        architecture="llama",
        num_layers=size(config, "num_hidden_layers", most=MOST_LAYERS),
        hidden_size=hidden,
        ffn_hidden_size=size(config, "intermediate_size"),
        num_attention_heads=heads,
        num_query_groups=size(config, "num_key_value_heads", heads),
        kv_channels=_head_dim(config, hidden, heads),
        vocab_size=size(config, "vocab_size"),
        max_position_embeddings=size(config, "max_position_embeddings", 2048),
        norm_epsilon=number(config, "rms_norm_eps", 1e-6, most=MOST_EPSILON),
        linear_biases=frozenset(name for key, names in biased.items() if switch(config, key) for name in names),
        tied_embeddings=switch(config, "tie_word_embeddings"),
        rotary_base=rope_theta,
        rope_scaling=rope_scaling,
    )


def _head_dim(config: Config, hidden: int, heads: int) -> int:
    require(
        config.get("head_dim") is not None or hidden % heads == 0,
        f"hidden_size {hidden} is no multiple of num_attention_heads {heads}, and head_dim is not given.",
    )
    head_dim = size(config, "head_dim", hidden // heads)
    require(head_dim % 2 == 0, f"head_dim {head_dim} is odd: rotary embeddings turn features in pairs.")
    return head_dim


def _rope(config: Config) -> tuple[float, RopeScaling | None]:
    """Base and scaling, from `rope_theta` and `rope_scaling` or from the newer `rope_parameters` that holds both."""
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
        f"rope_type {kind!r} is not supported. Supported: default, llama3.",
    )
    unknown = sorted(rope.keys() - ROPE_KEYS[kind])
    require(not unknown, f"{', '.join(unknown)} of rope_type {kind!r} is not supported.")
    return theta, _llama3_scaling(rope, config) if kind == "llama3" else None


def _llama3_scaling(rope: Config, config: Config) -> RopeScaling:
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
    return scaling


EMBEDDING = "model.embed_tokens"
OUTPUT = "lm_head"

# Megatron module: Hugging Face module, both of hidden features.
LAYER_NORMS = {"input_layernorm": "input_layernorm", "pre_mlp_layernorm": "post_attention_layernorm"}
# Megatron module: the Hugging Face modules fused into it with their output features; the input is hidden.
COLUMN_PARALLEL = {
    "self_attention.linear_qkv": {"self_attn.q_proj": "query", "self_attn.k_proj": "key", "self_attn.v_proj": "key"},
    "mlp.linear_fc1": {"mlp.gate_proj": "ffn", "mlp.up_proj": "ffn"},
}
# Megatron module: the Hugging Face module with its input features; the output is hidden.
ROW_PARALLEL = {
    "self_attention.linear_proj": ("self_attn.o_proj", "query"),
    "mlp.linear_fc2": ("mlp.down_proj", "ffn"),
}


def llama_rules(shape: ModelShape) -> list[Rule]:
    """One rule for each parameter of the whole model, layers numbered globally from 0."""
    rules: list[Rule] = [
        *vocabulary_rules(shape, EMBEDDING, OUTPUT),
        Replicated("decoder.final_layernorm.weight", (HFTensor("model.norm.weight", (shape.hidden_size,)),)),
    ]
    for layer in range(shape.num_layers):
        rules += _layer_rules(shape, f"decoder.layers.{layer}.", f"model.layers.{layer}.")
    return rules


def _layer_rules(shape: ModelShape, megatron: str, hugging_face: str) -> Iterator[Rule]:
    hidden = shape.hidden_size
    features = {
        "query": shape.num_attention_heads * shape.kv_channels,
        "key": shape.num_query_groups * shape.kv_channels,
        "ffn": shape.ffn_hidden_size,
    }
    for module, norm in LAYER_NORMS.items():
        yield Replicated(f"{megatron}{module}.weight", (HFTensor(f"{hugging_face}{norm}.weight", (hidden,)),))
    for module, linears in COLUMN_PARALLEL.items():
        num_groups = shape.num_query_groups if module.endswith("linear_qkv") else None
        for kind, columns in _kinds(shape, module, (hidden,)):
            parts = (HFTensor(f"{hugging_face}{n}.{kind}", (features[width], *columns)) for n, width in linears.items())
            yield FusedRows(f"{megatron}{module}.{kind}", tuple(parts), num_groups)
    for module, (linear, width) in ROW_PARALLEL.items():
        for kind, columns in _kinds(shape, module, (features[width],)):
            part = HFTensor(f"{hugging_face}{linear}.{kind}", (hidden, *columns))
            rule = Columns if columns else Replicated
            yield rule(f"{megatron}{module}.{kind}", (part,))


def _kinds(shape: ModelShape, module: str, columns: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The parameters of a linear layer, with the dimensions behind their rows."""
    yield "weight", columns
    if module.rpartition(".")[2] in shape.linear_biases:
        yield "bias", ()
