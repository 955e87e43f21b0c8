"""Bloom: its config.json in both directions (bigscience's older keys are read too), and the names of its weights."""

import logging
from typing import Any

from megatron_peft.config import LINEAR_MODULES, require
from megatron_peft.models.families import Family, WeightNames
from megatron_peft.models.shape import MOST, MOST_EPSILON, MOST_LAYERS, Config, ModelShape, number, size, switch

logger = logging.getLogger(__name__)

# Keys that change the computation -> the values that do not.
REFUSED: dict[str, tuple[Any, ...]] = {"apply_residual_connection_post_layernorm": (None, False)}
READ = {
    "n_layer", "num_hidden_layers", "n_head", "num_attention_heads", "hidden_size", "n_embed", "n_inner", "vocab_size",
    "seq_length", "layer_norm_epsilon", "tie_word_embeddings", "pretraining_tp", "slow_but_exact",
    # Kernels and fusions of the program that trained Bloom; transformers has none of them.
    "attention_softmax_in_fp32", "bias_dropout_fusion", "masked_softmax_fusion", "offset_alibi", "skip_bias_add",
    "skip_bias_add_qkv",
}  # fmt: skip


def bloom_shape(config: Config) -> ModelShape:
    """ConfigurationError names the key at fault."""
    heads = _size_of_either(config, "n_head", "num_attention_heads")
    hidden = _size_of_either(config, "hidden_size", "n_embed")
    inner = size(config, "n_inner", 4 * hidden)
    require(inner == 4 * hidden, f"n_inner is {inner}; Bloom's MLP has 4 x {hidden} = {4 * hidden} features.")
    require(hidden % heads == 0, f"hidden_size {hidden} is not a multiple of the {heads} attention heads.")
    # The switch should only change the order of sums, but with it transformers omits two biases of each layer.
    if switch(config, "slow_but_exact") and size(config, "pretraining_tp", 1) > 1:
        logger.warning(
            "slow_but_exact is ignored: with it transformers leaves out the biases of dense and dense_4h_to_h, "
            "so its logits differ from these. Set it to false in config.json to compare."
        )
    return ModelShape(
        architecture="bloom",
        num_layers=_size_of_either(config, "n_layer", "num_hidden_layers", most=MOST_LAYERS),
        hidden_size=hidden,
        ffn_hidden_size=4 * hidden,
        num_attention_heads=heads,
        num_query_groups=heads,
        kv_channels=hidden // heads,
        vocab_size=size(config, "vocab_size"),
        max_position_embeddings=size(config, "seq_length", 2048),
        normalization="LayerNorm",
        norm_epsilon=number(config, "layer_norm_epsilon", 1e-5, most=MOST_EPSILON),
        activation="gelu_tanh",
        gated_linear_unit=False,
        linear_biases=frozenset(LINEAR_MODULES),
        tied_embeddings=switch(config, "tie_word_embeddings", True),
        position_embedding="alibi",
        embedding_layernorm=True,
    )


def _size_of_either(config: Config, *names: str, most: int = MOST) -> int:
    """A size that any of several keys may hold."""
    sizes = {name: size(config, name, most=most) for name in names if config.get(name) is not None}
    require(bool(sizes), f"{' (or '.join(names)}) is missing.")
    require(
        len(set(sizes.values())) == 1,
        " and ".join(f"{name} {value}" for name, value in sizes.items()) + " are the same thing and differ.",
    )
    return next(iter(sizes.values()))


def bloom_config(shape: ModelShape) -> dict[str, Any]:
    """The inverse of `bloom_shape`, in transformers' keys."""
    return {
        "n_layer": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "n_head": shape.num_attention_heads,
        "vocab_size": shape.vocab_size,
        "seq_length": shape.max_position_embeddings,
        "layer_norm_epsilon": shape.norm_epsilon,
        "tie_word_embeddings": shape.tied_embeddings,
    }


FAMILY = Family(
    # Embedding and output layer are one matrix, so a bare BloomModel is the whole language model.
    architectures=("BloomForCausalLM", "BloomModel"),
    shape=bloom_shape,
    config=bloom_config,
    read=READ,
    refused=REFUSED,
    weights=WeightNames(
        prefix="transformer.",
        embedding="word_embeddings",
        embedding_norm="word_embeddings_layernorm",
        final_norm="ln_f",
        layers="h",
        input_norm="input_layernorm",
        mlp_norm="post_attention_layernorm",
        # Bloom was trained with Megatron: the rows of its fused q, k and v are ordered as Megatron's.
        linear_qkv=("self_attention.query_key_value",),
        linear_proj="self_attention.dense",
        linear_fc1=("mlp.dense_h_to_4h",),
        linear_fc2="mlp.dense_4h_to_h",
    ),
    vllm_serves_lora=False,
)
