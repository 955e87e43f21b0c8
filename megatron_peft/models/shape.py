"""The shape of a base model: everything that decides which tensors exist and what the forward computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_peft.config import require


@dataclass(frozen=True)
class RopeScaling:
    """Llama-3's rope scaling (`rope_type: llama3`); lengths in tokens."""

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder-only transformer. Names are megatron-core's where it has one.

    `linear_biases` names the linear layers that own a bias (`linear_qkv`, ...): Hugging Face configures attention and
    MLP biases apart, TransformerConfig does not.
    """

    architecture: Literal["llama", "bloom"]
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int  # features of one head
    vocab_size: int  # without padding
    max_position_embeddings: int
    normalization: Literal["RMSNorm", "LayerNorm"] = "RMSNorm"
    norm_epsilon: float = 1e-5
    activation: Literal["silu", "gelu", "gelu_tanh"] = "silu"
    gated_linear_unit: bool = True
    linear_biases: frozenset[str] = frozenset()
    tied_embeddings: bool = False
    position_embedding: Literal["rope", "alibi"] = "rope"
    rotary_base: float = 10000.0
    rope_scaling: RopeScaling | None = None
    embedding_layernorm: bool = False

    def __post_init__(self) -> None:
        require(
            self.num_attention_heads % self.num_query_groups == 0,
            f"{self.num_attention_heads} attention heads cannot share {self.num_query_groups} key-value heads.",
        )

    def padded_vocab_size(self, multiple: int, tensor_parallel_size: int) -> int:
        """Rows of the embedding and of the output layer: `vocab_size` rounded up so that every rank holds as many.

        The rows above `vocab_size` are zero and their logits are masked, so the loss does not depend on them.
        """
        unit = multiple * tensor_parallel_size
        return -(-self.vocab_size // unit) * unit
