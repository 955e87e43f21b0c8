"""The Bloom table: which Megatron parameter is made of which Hugging Face tensor.

Bloom was trained with Megatron, so every parameter is one tensor: linear_qkv has its rows as [head, (q, k, v), feature]
on both sides.
"""

from collections.abc import Iterator

from megatron_peft.models.rules import Columns, FusedRows, Part, Replicated, Rule, VocabularyRows
from megatron_peft.models.shape import ModelShape

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
    rules = [
        _vocabulary("embedding.word_embeddings", EMBEDDING, shape),
        _vocabulary("output_layer", EMBEDDING if shape.tied_embeddings else OUTPUT, shape),
    ]
    for module, norm in NORMS.items():
        rules += _norm(module, norm, shape.hidden_size)
    for layer in range(shape.num_layers):
        rules += _layer_rules(shape, f"decoder.layers.{layer}.", f"transformer.h.{layer}.")
    return rules


def _vocabulary(megatron: str, hugging_face: str, shape: ModelShape) -> Rule:
    part = Part(f"{hugging_face}.weight", (shape.vocab_size, shape.hidden_size))
    return VocabularyRows(f"{megatron}.weight", (part,))


def _norm(megatron: str, hugging_face: str, hidden: int) -> Iterator[Rule]:
    for kind in ("weight", "bias"):
        yield Replicated(f"{megatron}.{kind}", (Part(f"{hugging_face}.{kind}", (hidden,)),))


def _layer_rules(shape: ModelShape, megatron: str, hugging_face: str) -> Iterator[Rule]:
    hidden = shape.hidden_size
    for module, norm in LAYER_NORMS.items():
        yield from _norm(f"{megatron}{module}", f"{hugging_face}{norm}", hidden)
    for module, (linear, width) in COLUMN_PARALLEL.items():
        num_groups = shape.num_attention_heads if module.endswith("linear_qkv") else None
        for kind, columns in (("weight", (hidden,)), ("bias", ())):
            part = Part(f"{hugging_face}{linear}.{kind}", (width * hidden, *columns))
            yield FusedRows(f"{megatron}{module}.{kind}", (part,), num_groups)
    for module, (linear, width) in ROW_PARALLEL.items():
        weight, bias = f"{hugging_face}{linear}.weight", f"{hugging_face}{linear}.bias"
        yield Columns(f"{megatron}{module}.weight", (Part(weight, (hidden, width * hidden)),))
        yield Replicated(f"{megatron}{module}.bias", (Part(bias, (hidden,)),))
