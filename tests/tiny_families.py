"""Small Mistral, Qwen2 and Qwen3 models of odd shapes, as Hugging Face folders."""

from pathlib import Path
from typing import Any

from tests.tiny_llama import VOCAB_SIZE, draw_parameters

SIZES = {
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 256,
}
# Per family an untied model and a tied one; heads of hidden size / heads, and others; a window that fits the tests.
MODELS: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": None, "head_dim": 20},
    "mistral tied": {"sliding_window": 160, "tie_word_embeddings": True},
    "qwen2": {},
    "qwen2 tied": {"tie_word_embeddings": True, "use_sliding_window": True, "sliding_window": 160}
    | {"max_window_layers": 1},
    "qwen3": {"head_dim": 20},
    "qwen3 tied": {"tie_word_embeddings": True, "head_dim": 32, "attention_bias": True},
}


def random_model(name: str, seed: int = 0, **changes: Any):
    """One of MODELS with `changes`, every parameter random: biases and norms too."""
    import torch
    import transformers

    family = name.split()[0]
    prefix = family.capitalize()
    config = getattr(transformers, f"{prefix}Config")(**{**SIZES, **MODELS[name], **changes})
    torch.manual_seed(seed)
    model = getattr(transformers, f"{prefix}ForCausalLM")(config).eval()
    draw_parameters(model, std=0.08)
    return model


def save_model(folder: Path, name: str, seed: int = 0, **changes: Any) -> Path:
    """`random_model` as transformers writes it."""
    random_model(name, seed, **changes).save_pretrained(folder)
    return folder
