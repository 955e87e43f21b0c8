"""A small GPTModel with random weights in the present world, without any file."""

from typing import Any

import torch
from megatron.core.models.gpt import GPTModel

from megatron_peft.config import ModelConfig, ParallelConfig
from megatron_peft.models.gpt import build_model_chunks
from megatron_peft.models.kernels import ONLY_ANSWERS, Training
from megatron_peft.models.shape import ModelShape

SIZES: dict[str, Any] = {
    "architecture": "llama",
    "num_layers": 2,
    "hidden_size": 24,
    "ffn_hidden_size": 40,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "kv_channels": 8,
    "vocab_size": 37,
    "max_position_embeddings": 64,
}


def tiny_gpt(shape: dict[str, Any] | None = None, training: Training = ONLY_ANSWERS, **model: Any) -> GPTModel:
    """SIZES with changes; `model` are fields of ModelConfig. The padding of the vocabulary changes no weight."""
    sizes = ModelShape(**{**SIZES, **(shape or {})})
    (chunk,) = build_model_chunks(sizes, ModelConfig("none", **model), ParallelConfig(), training)
    for name, parameter in chunk.named_parameters():
        draw = torch.Generator().manual_seed(sum(name.encode()))
        columns = parameter.shape[1:] if parameter.ndim > 1 else ()
        num_rows = min(parameter.shape[0], sizes.vocab_size) if "embedd" in name or "output" in name else len(parameter)
        values = torch.randn(num_rows, *columns, generator=draw) * 0.2
        parameter.data.zero_()[:num_rows] = values + (1.0 if "norm" in name else 0.0)
    return chunk
