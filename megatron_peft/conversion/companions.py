"""The small files beside weights: config.json, generation settings, the tokenizer's."""

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_peft.config.untrusted import read_json_object
from megatron_peft.models.shape import ModelShape

CONFIG = "config.json"
# Of a Hugging Face folder. Weights and code are not among them.
COPIED = (
    CONFIG,
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "spiece.model",
    "chat_template*",
)
TYPE_KEYS = ("dtype", "torch_dtype")  # of config.json: new and old


def copy_companions(source: Path, target: Path) -> None:
    """Copy what there is; contents only, no permissions."""
    for path in companions(source):
        shutil.copyfile(path, target / path.name)


def companions(folder: Path) -> Iterator[Path]:
    """The small files of `folder` that belong to any form of its model."""
    return (path for pattern in COPIED for path in sorted(folder.glob(pattern)) if path.is_file())


def set_stored_type(folder: Path, dtypes: Iterable[torch.dtype]) -> None:
    """Let config.json name the type that the weights are written in: transformers loads them in what it says.

    Nothing changes if it says so already, or if the weights are of several types.
    """
    names = list({str(dtype).removeprefix("torch.") for dtype in dtypes})
    path = folder / CONFIG
    config = read_json_object(path)
    keys = [key for key in TYPE_KEYS if config.get(key) is not None] or [TYPE_KEYS[0]]
    if len(names) == 1 and any(config.get(key) != names[0] for key in keys):
        write_config(folder, config | dict.fromkeys(keys, names[0]))


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """config.json as transformers writes it."""
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def config_of_shape(shape: ModelShape) -> dict[str, Any]:
    """A config.json for a model that has lost its own; `models.huggingface.read_shape` gives the shape back."""
    return CONFIGS[shape.architecture](shape)


def _llama_config(shape: ModelShape) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": shape.rotary_base}
    if shape.rope_scaling is not None:
        rope |= {"rope_type": "llama3", **vars(shape.rope_scaling)}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
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
        "attention_bias": "linear_qkv" in shape.linear_biases,
        "mlp_bias": "linear_fc1" in shape.linear_biases,
        "tie_word_embeddings": shape.tied_embeddings,
        "rope_parameters": rope,
    }


def _bloom_config(shape: ModelShape) -> dict[str, Any]:
    return {
        "architectures": ["BloomForCausalLM"],
        "model_type": "bloom",
        "n_layer": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "n_head": shape.num_attention_heads,
        "vocab_size": shape.vocab_size,
        "seq_length": shape.max_position_embeddings,
        "layer_norm_epsilon": shape.norm_epsilon,
        "tie_word_embeddings": shape.tied_embeddings,
    }


CONFIGS = {"llama": _llama_config, "bloom": _bloom_config}
