"""The shape of a base model: everything that decides which tensors exist and what the forward computes."""

from dataclasses import dataclass
from typing import Any, Literal

from megatron_peft.config import require

MOST = 2**31 - 1  # of any size; products of two of them are still integers of 64 bits
MOST_LAYERS = 99_999
MOST_EPSILON = 1.0  # a larger one is no guard against a division by zero: it is the norm
_SIZES = (
    *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels"),
    *("vocab_size", "max_position_embeddings"),
)


def is_size(value: Any, most: int = MOST) -> bool:
    """Whether it is a whole number from 1 to `most`."""
    return type(value) is int and 0 < value <= most


def is_positive(value: Any) -> bool:
    """Whether it is a number above 0 that float32, in which models compute, rounds neither to 0 nor to infinity."""
    return type(value) in (int, float) and 2.0**-126 <= value < 2.0**128


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
        """Whoever reads a shape, from whatever file, passes here."""
        wrong = [name for name in _SIZES if not is_size(getattr(self, name))]
        wrong += ["num_layers"] * (not wrong and self.num_layers > MOST_LAYERS)
        wrong += [name for name in ("norm_epsilon", "rotary_base") if not is_positive(getattr(self, name))]
        wrong += ["norm_epsilon"] * (not wrong and self.norm_epsilon > MOST_EPSILON)
        told = ", ".join(f"{name} {str(getattr(self, name))[:40]}" for name in wrong)
        require(not wrong, f"a model's shape cannot have {told}.")
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
