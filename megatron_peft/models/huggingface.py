"""The shape of a model from a Hugging Face `config.json`. Plain JSON: neither transformers nor torch is imported.

What a config asks for and the model does not do is refused by name. Keys that transformers' own class does not define
change nothing there either; they are named in a warning.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megatron_peft.config import ConfigurationError, require
from megatron_peft.models.shape import ModelShape, RopeScaling

logger = logging.getLogger(__name__)

Config = Mapping[str, Any]

# Keys that change the computation, with the values that leave it as it is.
REFUSED: dict[str, tuple[Any, ...]] = {
    "quantization_config": (None,),
    "compression_config": (None,),
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
    "is_encoder_decoder": (None, False),
    "add_cross_attention": (None, False),
    "pruned_heads": (None, {}),
}
# Keys that are read, as distinct from those below.
READ = {
    "architectures", "model_type", "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads",
    "num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings",
    "attention_bias", "mlp_bias", "rope_theta", "rope_scaling", "rope_parameters", "original_max_position_embeddings",
}  # fmt: skip
# Bookkeeping, tokens, generation and dropout (a flag of the run): no part of a model's shape.
HARMLESS = {
    "_name_or_path", "transformers_version", "_attn_implementation_autoset", "torch_dtype", "dtype", "use_cache",
    "initializer_range", "attention_dropout", "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id",
    "sep_token_id", "decoder_start_token_id", "output_attentions", "output_hidden_states", "return_dict",
    "use_return_dict", "torchscript", "use_bfloat16", "chunk_size_feed_forward", "is_decoder", "id2label", "label2id",
    "num_labels", "problem_type", "finetuning_task", "task_specific_params", "tokenizer_class", "prefix",
    "gradient_checkpointing", "max_sequence_length", "max_length", "min_length", "do_sample", "temperature", "top_k",
    "top_p", "typical_p", "repetition_penalty", "length_penalty", "num_beams", "early_stopping", "is_llama_config",
    "transformers.js_config",
}  # fmt: skip

ROPE_KEYS = {
    "default": {"rope_theta"},
    "linear": {"rope_theta", "factor"},
    "llama3": {
        "rope_theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings",
    },
}  # fmt: skip


def read_shape(folder: str | Path) -> ModelShape:
    """Shape of the model in `folder`. ConfigurationError names the file and the key at fault."""
    path = Path(folder) / "config.json"
    config = _read_json(path)
    _require_supported_architecture(path, config)
    _refuse_unsupported(path, config)
    try:
        return FAMILIES[config["model_type"]](config)
    except ConfigurationError as error:
        raise ConfigurationError(f"{path}: {error}") from None


def _read_json(path: Path) -> dict[str, Any]:
    require(
        path.parent.is_dir(),
        f"--pretrained-checkpoint {path.parent} is not a folder: give the folder of a downloaded model.",
    )
    require(
        path.is_file(),
        f"--pretrained-checkpoint {path.parent} holds no config.json: it is not a Hugging Face model folder.",
    )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigurationError(f"{path} is not JSON ({error}): copy or download it again.") from error
    require(isinstance(config, dict), f"{path} holds no JSON object.")
    return config


def _require_supported_architecture(path: Path, config: Config) -> None:
    supported = ", ".join(ARCHITECTURES.values())
    model_type, named = config.get("model_type"), config.get("architectures") or []
    require(
        model_type in FAMILIES and set(named) <= {ARCHITECTURES[model_type]},
        f"{path} describes {', '.join(named) or 'a model'} of model_type {model_type!r}, which is not supported. "
        f"Supported: {supported}.",
    )


def _refuse_unsupported(path: Path, config: Config) -> None:
    refused = [key for key, accepted in REFUSED.items() if config.get(key) not in accepted]
    told = ", ".join(f"{key}={json.dumps(config[key])[:80]}" for key in refused)
    require(not refused, f"{path} asks for what is not supported: {told}. Use a checkpoint without it.")
    unknown = sorted(config.keys() - READ - HARMLESS - REFUSED.keys())
    if unknown:
        logger.warning("%s: keys without a meaning for this model are ignored: %s", path, ", ".join(unknown))


def _llama_shape(config: Config) -> ModelShape:
    heads, hidden = _size(config, "num_attention_heads"), _size(config, "hidden_size")
    rope_theta, rope_scaling = _rope(config)
    biased = {"attention_bias": ("linear_qkv", "linear_proj"), "mlp_bias": ("linear_fc1", "linear_fc2")}
    return ModelShape(
        architecture="llama",
        num_layers=_size(config, "num_hidden_layers"),
        hidden_size=hidden,
        ffn_hidden_size=_size(config, "intermediate_size"),
        num_attention_heads=heads,
        num_query_groups=_size(config, "num_key_value_heads", heads),
        kv_channels=_head_dim(config, hidden, heads),
        vocab_size=_size(config, "vocab_size"),
        max_position_embeddings=_size(config, "max_position_embeddings", 2048),
        norm_epsilon=_number(config, "rms_norm_eps", 1e-6),
        linear_biases=frozenset(name for key, names in biased.items() if _switch(config, key) for name in names),
        tied_embeddings=_switch(config, "tie_word_embeddings"),
        rotary_base=rope_theta,
        rope_scaling=rope_scaling,
    )


def _head_dim(config: Config, hidden: int, heads: int) -> int:
    require(
        config.get("head_dim") is not None or hidden % heads == 0,
        f"hidden_size {hidden} is no multiple of num_attention_heads {heads}, and head_dim is not given.",
    )
    head_dim = _size(config, "head_dim", hidden // heads)
    require(head_dim % 2 == 0, f"head_dim {head_dim} is odd: rotary embeddings turn features in pairs.")
    return head_dim


def _rope(config: Config) -> tuple[float, RopeScaling | None]:
    """Base and scaling, from `rope_theta` and `rope_scaling` or from the newer `rope_parameters` that holds both."""
    given = config.get("rope_scaling") or config.get("rope_parameters") or {}
    require(isinstance(given, dict), f"rope_scaling is {given!r}, not an object.")
    rope = {key: value for key, value in given.items() if value is not None}
    kind = rope.pop("rope_type", None) or rope.get("type", "default")
    rope.pop("type", None)
    theta = _number(rope, "rope_theta", _number(config, "rope_theta", 10000.0))
    if rope.get("partial_rotary_factor") == 1:
        del rope["partial_rotary_factor"]
    require(
        kind in ROPE_KEYS and (kind != "linear" or rope.get("factor") == 1),
        f"rope_type {kind!r} is not supported. Supported: default, llama3.",
    )
    unknown = sorted(rope.keys() - ROPE_KEYS[kind])
    require(not unknown, f"{', '.join(unknown)} of rope_type {kind!r} is not supported.")
    return theta, _llama3_scaling(rope, config) if kind == "llama3" else None


def _llama3_scaling(rope: Config, config: Config) -> RopeScaling:
    length = "original_max_position_embeddings"
    trained_length = config.get(length) or rope.get(length) or config.get("max_position_embeddings")
    scaling = RopeScaling(
        factor=_number(rope, "factor"),
        low_freq_factor=_number(rope, "low_freq_factor"),
        high_freq_factor=_number(rope, "high_freq_factor"),
        original_max_position_embeddings=_size({length: trained_length}, length),
    )
    require(
        scaling.high_freq_factor > scaling.low_freq_factor,
        f"high_freq_factor {scaling.high_freq_factor} must be above low_freq_factor {scaling.low_freq_factor}.",
    )
    return scaling


def _value(config: Config, key: str, default: Any) -> Any:
    value = config.get(key)
    value = default if value is None else value
    require(value is not None, f"{key} is missing.")
    return value


def _size(config: Config, key: str, default: int | None = None) -> int:
    value = _value(config, key, default)
    require(type(value) is int and value > 0, f"{key} is {value!r}; it must be a whole number above 0.")
    return value


def _number(config: Config, key: str, default: float | None = None) -> float:
    value = _value(config, key, default)
    require(type(value) in (int, float) and value > 0, f"{key} is {value!r}; it must be a number above 0.")
    return float(value)


def _switch(config: Config, key: str) -> bool:
    value = _value(config, key, False)
    require(type(value) is bool, f"{key} is {value!r}; it must be true or false.")
    return value


# model_type: the reader of its shape, and the one class of it that is a language model.
FAMILIES: dict[str, Callable[[Config], ModelShape]] = {"llama": _llama_shape}
ARCHITECTURES = {"llama": "LlamaForCausalLM"}
