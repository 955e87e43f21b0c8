"""A small Llama of an odd shape, saved as a Hugging Face folder, and a data set for it."""

import json
import random
from pathlib import Path
from typing import Any

VOCAB_SIZE = 1001  # odd: padding must not matter
ODD_SHAPE = {
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 20,  # not hidden_size / heads
    "vocab_size": VOCAB_SIZE,
    "attention_bias": True,
    "mlp_bias": True,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
}


def draw_parameters(model: Any, std: float) -> None:
    """Every parameter at random: biases and norms too."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(std=0.1)
        elif "norm" in name or "ln_f" in name:
            parameter.data.uniform_(0.5, 1.5)
        else:
            parameter.data.normal_(std=std)


def save_llama(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """Random weights (biases too) of ODD_SHAPE with `changes`, as transformers writes them."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**{**ODD_SHAPE, **changes}))
    draw_parameters(model, std=0.08)
    model.save_pretrained(folder)
    return folder


def save_pairs(path: Path, num_samples: int = 40, seed: int = 0) -> Path:
    """Prompts and completions of random token ids (for NullTokenizer), of many lengths."""
    draw = random.Random(seed)

    def words(shortest: int, longest: int) -> str:
        return " ".join(str(draw.randrange(VOCAB_SIZE - 1)) for _ in range(draw.randint(shortest, longest)))

    lines = [json.dumps({"prompt": words(2, 12), "completion": " " + words(1, 9)}) for _ in range(num_samples)]
    path.write_text("\n".join(lines) + "\n")
    return path
