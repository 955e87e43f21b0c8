"""The shape of a Bloom from its `config.json`: keys of transformers, and those of the first files of bigscience."""

import logging
from typing import Any

from megatron_peft.config import LINEAR_MODULES, require
from megatron_peft.models.huggingface_values import Config, number, size, switch
from megatron_peft.models.shape import MOST, MOST_EPSILON, MOST_LAYERS, ModelShape

logger = logging.getLogger(__name__)

# Keys that change the computation, with the values that leave it as it is.
REFUSED: dict[str, tuple[Any, ...]] = {"apply_residual_connection_post_layernorm": (None, False)}
READ = {
    "n_layer", "num_hidden_layers", "n_head", "num_attention_heads", "hidden_size", "n_embed", "n_inner", "vocab_size",
    "seq_length", "layer_norm_epsilon", "tie_word_embeddings", "pretraining_tp", "slow_but_exact",
    # Kernels and fusions of the program that trained Bloom. transformers knows none of them.
    "attention_softmax_in_fp32", "bias_dropout_fusion", "masked_softmax_fusion", "offset_alibi", "skip_bias_add",
    "skip_bias_add_qkv",
}  # fmt: skip
# Linear layers: Megatron's that holds each.
MODULES = {
    "query_key_value": "linear_qkv",
    "dense": "linear_proj",
    "dense_h_to_4h": "linear_fc1",
    "dense_4h_to_h": "linear_fc2",
}


def bloom_shape(config: Config) -> ModelShape:
    """ConfigurationError names the key at fault."""
    heads, hidden = _size_of_either(config, "n_head", "num_attention_heads"), _hidden_size(config)
    require(hidden % heads == 0, f"hidden_size {hidden} is no multiple of the {heads} attention heads.")
    _warn_of_lost_biases(config)
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


def _hidden_size(config: Config) -> int:
    hidden = _size_of_either(config, "hidden_size", "n_embed")
    inner = size(config, "n_inner", 4 * hidden)
    require(inner == 4 * hidden, f"n_inner is {inner}; Bloom's MLP has 4 x {hidden} = {4 * hidden} features.")
    return hidden


def _size_of_either(config: Config, *names: str, most: int = MOST) -> int:
    """A size that goes by several names, any of which may be there."""
    sizes = {name: size(config, name, most=most) for name in names if config.get(name) is not None}
    require(bool(sizes), f"{' (or '.join(names)}) is missing.")
    require(
        len(set(sizes.values())) == 1,
        " and ".join(f"{name} {value}" for name, value in sizes.items()) + " are the same thing and differ.",
    )
    return next(iter(sizes.values()))


def _warn_of_lost_biases(config: Config) -> None:
    """The switch should only change the order of sums, but transformers then leaves two biases of a layer out."""
    if switch(config, "slow_but_exact") and size(config, "pretraining_tp", 1) > 1:
        logger.warning(
            "slow_but_exact is ignored: with it transformers leaves out the biases of dense and dense_4h_to_h, "
            "so its logits differ from these. Set it to false in config.json to compare."
        )
