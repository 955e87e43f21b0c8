"""A small Bloom of an odd shape, saved as a Hugging Face folder."""

from pathlib import Path
from typing import Any

from tests.tiny_llama import VOCAB_SIZE, draw_parameters

ODD_SHAPE = {
    "hidden_size": 72,
    "n_layer": 4,
    "n_head": 6,  # no power of two: ALiBi's slopes are of both kinds
    "vocab_size": VOCAB_SIZE,
}


def random_bloom(seed: int = 0, **changes: Any):
    """A BloomForCausalLM of ODD_SHAPE with `changes`, every parameter random: biases and norms too."""
    import torch
    from transformers import BloomConfig, BloomForCausalLM

    torch.manual_seed(seed)
    model = BloomForCausalLM(BloomConfig(**{**ODD_SHAPE, **changes})).eval()
    draw_parameters(model, std=0.12)
    return model


def save_bloom(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """`random_bloom` as transformers writes it."""
    random_bloom(seed, **changes).save_pretrained(folder)
    return folder
