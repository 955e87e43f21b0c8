"""The Llama table: which Megatron parameter is made of which Hugging Face tensors."""

from collections.abc import Iterator

from megatron_peft.models.rules import Columns, FusedRows, Part, Replicated, Rule, VocabularyRows
from megatron_peft.models.shape import ModelShape

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
        _vocabulary("embedding.word_embeddings", EMBEDDING, shape),
        _vocabulary("output_layer", EMBEDDING if shape.tied_embeddings else OUTPUT, shape),
        Replicated("decoder.final_layernorm.weight", (Part("model.norm.weight", (shape.hidden_size,)),)),
    ]
    for layer in range(shape.num_layers):
        rules += _layer_rules(shape, f"decoder.layers.{layer}.", f"model.layers.{layer}.")
    return rules


def _vocabulary(megatron: str, hugging_face: str, shape: ModelShape) -> Rule:
    part = Part(f"{hugging_face}.weight", (shape.vocab_size, shape.hidden_size))
    return VocabularyRows(f"{megatron}.weight", (part,))


def _layer_rules(shape: ModelShape, megatron: str, hugging_face: str) -> Iterator[Rule]:
    hidden = shape.hidden_size
    features = {
        "query": shape.num_attention_heads * shape.kv_channels,
        "key": shape.num_query_groups * shape.kv_channels,
        "ffn": shape.ffn_hidden_size,
    }
    for module, norm in LAYER_NORMS.items():
        yield Replicated(f"{megatron}{module}.weight", (Part(f"{hugging_face}{norm}.weight", (hidden,)),))
    for module, linears in COLUMN_PARALLEL.items():
        num_groups = shape.num_query_groups if module.endswith("linear_qkv") else None
        for kind, columns in _kinds(shape, module, (hidden,)):
            parts = (Part(f"{hugging_face}{n}.{kind}", (features[size], *columns)) for n, size in linears.items())
            yield FusedRows(f"{megatron}{module}.{kind}", tuple(parts), num_groups)
    for module, (linear, size) in ROW_PARALLEL.items():
        for kind, columns in _kinds(shape, module, (features[size],)):
            part = Part(f"{hugging_face}{linear}.{kind}", (hidden, *columns))
            rule = Columns if columns else Replicated
            yield rule(f"{megatron}{module}.{kind}", (part,))


def _kinds(shape: ModelShape, module: str, columns: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The parameters of a linear layer, with the dimensions behind their rows."""
    yield "weight", columns
    if module.rpartition(".")[2] in shape.linear_biases:
        yield "bias", ()
