"""The shape of a model from the arguments that Megatron-LM keeps in its checkpoints."""

from typing import Any

from megatron_peft.config import LINEAR_MODULES, require
from megatron_peft.models.shape import ModelShape, is_size

WAY_OUT = "give the model's config.json: put it into the folder, or name its folder with --pretrained-checkpoint."
# What a Llama of Megatron-LM is made with; anything else computes something else.
LLAMA = {
    "swiglu": True,
    "normalization": "RMSNorm",
    "position_embedding_type": "rope",
    "rotary_percent": 1.0,
    "use_rope_scaling": False,
    "qk_layernorm": False,
    "num_experts": None,
    "multi_latent_attention": False,
    "rotary_interleaved": False,
    "layernorm_zero_centered_gamma": False,
    "apply_layernorm_1p": False,
}


def shape_of_arguments(arguments: Any, where: str) -> ModelShape:
    """Shape of a Llama; `where` names the checkpoint in errors.

    Raises:
        ConfigurationError: there are no arguments, they describe another kind of model, or the vocabulary was padded
            and they do not say from what.
    """
    require(arguments is not None, f"{where} does not say what model it is: {WAY_OUT}")
    given = vars(arguments)
    other = [f"{name} {given[name]!r}" for name, value in LLAMA.items() if given.get(name, value) not in (value, None)]
    require(not other, f"{where} was trained with {', '.join(other)}, which is not read from arguments: {WAY_OUT}")
    sizes = {name: given.get(name) for name in ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads")}
    lost = [name for name, value in sizes.items() if value is None]
    require(not lost, f"the arguments in {where} lack {', '.join(lost)}: {WAY_OUT}")
    odd = [f"{name} {str(value)[:40]}" for name, value in sizes.items() if not is_size(value)]
    require(not odd, f"the arguments in {where} have {', '.join(odd)}, which is no size: {WAY_OUT}")
    vocab_size = given.get("vocab_size")
    require(
        vocab_size is not None,
        f"{where} holds a vocabulary padded to {given.get('padded_vocab_size')} rows and does not say from how many: "
        f"{WAY_OUT}",
    )
    heads = sizes["num_attention_heads"]
    grouped = given.get("group_query_attention")
    return ModelShape(
        architecture="llama",
        **sizes,
        num_query_groups=given.get("num_query_groups") or heads if grouped else heads,
        kv_channels=given.get("kv_channels") or sizes["hidden_size"] // heads,
        vocab_size=vocab_size,
        max_position_embeddings=given.get("max_position_embeddings") or 2048,
        norm_epsilon=given.get("norm_epsilon", given.get("layernorm_epsilon", 1e-5)),
        linear_biases=_biases(given),
        tied_embeddings=not given.get("untie_embeddings_and_output_weights"),
        rotary_base=float(given.get("rotary_base") or 10000),
    )


def _biases(given: dict[str, Any]) -> frozenset[str]:
    if given.get("add_bias_linear"):
        return frozenset(LINEAR_MODULES)
    return frozenset({"linear_qkv"} if given.get("add_qkv_bias") else ())
