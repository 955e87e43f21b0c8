"""Bloom: its shape from a `config.json` (keys of transformers, and of the first files of bigscience), and the rules
for its weights."""

import logging
from collections.abc import Iterator
from typing import Any

from megatron_peft.config import LINEAR_MODULES, require
from megatron_peft.models.rules import Columns, FusedRows, HFTensor, Replicated, Rule, vocabulary_rules
from megatron_peft.models.shape import MOST, MOST_EPSILON, MOST_LAYERS, Config, ModelShape, number, size, switch

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


# The Bloom table: which Megatron parameter is made of which Hugging Face tensor.
#
# Bloom was trained with Megatron, so every parameter is one tensor: linear_qkv has its rows as [head, (q, k, v),
# feature] on both sides.

EMBEDDING = "transformer.word_embeddings"
OUTPUT = "lm_head"

# Megatron module: Hugging Face module, both of hidden features.
NORMS = {
    "embedding.word_embeddings_layernorm": "transformer.word_embeddings_layernorm",
    "decoder.final_layernorm": "transformer.ln_f",
}
LAYER_NORMS = {"input_layernorm": "input_layernorm", "pre_mlp_layernorm": "post_attention_layernorm"}
# Megatron module: the Hugging Face module with its output features, in units of hidden; the input is hidden.
COLUMN_PARALLEL = {
    "self_attention.linear_qkv": ("self_attention.query_key_value", 3),
    "mlp.linear_fc1": ("mlp.dense_h_to_4h", 4),
}
# Megatron module: the Hugging Face module with its input features, in units of hidden; the output is hidden.
ROW_PARALLEL = {
    "self_attention.linear_proj": ("self_attention.dense", 1),
    "mlp.linear_fc2": ("mlp.dense_4h_to_h", 4),
}


def bloom_rules(shape: ModelShape) -> list[Rule]:
    """One rule for each parameter of the whole model, layers numbered globally from 0."""
    rules = vocabulary_rules(shape, EMBEDDING, OUTPUT)
    for module, norm in NORMS.items():
        rules += _norm(module, norm, shape.hidden_size)
    for layer in range(shape.num_layers):
        rules += _layer_rules(shape, f"decoder.layers.{layer}.", f"transformer.h.{layer}.")
    return rules


def _norm(megatron: str, hugging_face: str, hidden: int) -> Iterator[Rule]:
    for kind in ("weight", "bias"):
        yield Replicated(f"{megatron}.{kind}", (HFTensor(f"{hugging_face}.{kind}", (hidden,)),))


def _layer_rules(shape: ModelShape, megatron: str, hugging_face: str) -> Iterator[Rule]:
    hidden = shape.hidden_size
    for module, norm in LAYER_NORMS.items():
        yield from _norm(f"{megatron}{module}", f"{hugging_face}{norm}", hidden)
    for module, (linear, width) in COLUMN_PARALLEL.items():
        num_groups = shape.num_attention_heads if module.endswith("linear_qkv") else None
        for kind, columns in (("weight", (hidden,)), ("bias", ())):
            part = HFTensor(f"{hugging_face}{linear}.{kind}", (width * hidden, *columns))
            yield FusedRows(f"{megatron}{module}.{kind}", (part,), num_groups)
    for module, (linear, width) in ROW_PARALLEL.items():
        weight, bias = f"{hugging_face}{linear}.weight", f"{hugging_face}{linear}.bias"
        yield Columns(f"{megatron}{module}.weight", (HFTensor(weight, (hidden, width * hidden)),))
        yield Replicated(f"{megatron}{module}.bias", (HFTensor(bias, (hidden,)),))
