"""The shape of a model from Megatron-LM's arguments."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import pytest

from megatron_peft.config import LINEAR_MODULES, ConfigurationError
from megatron_peft.conversion.legacy_arguments import shape_of_arguments
from megatron_peft.models.shape import ModelShape

GIVEN: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 24,
    "ffn_hidden_size": 40,
    "num_attention_heads": 4,
    "group_query_attention": True,
    "num_query_groups": 2,
    "kv_channels": 8,
    "vocab_size": 37,
    "padded_vocab_size": 128,
    "max_position_embeddings": 64,
    "norm_epsilon": 1e-6,
    "rotary_base": 500000,
    "untie_embeddings_and_output_weights": True,
    "swiglu": True,
    "normalization": "RMSNorm",
    "position_embedding_type": "rope",
    "rotary_percent": 1.0,
}
SHAPE = ModelShape("llama", 2, 24, 40, 4, 2, 8, 37, 64, norm_epsilon=1e-6, rotary_base=500000.0)


def shape(**changes: Any) -> ModelShape:
    return shape_of_arguments(Namespace(**GIVEN | changes), "folder")


def test_llama_is_recognised() -> None:
    assert shape() == SHAPE


def test_without_grouped_queries_each_head_has_its_own_keys() -> None:
    assert shape(group_query_attention=False, num_query_groups=1).num_query_groups == 4


def test_biases_follow_the_switches() -> None:
    assert shape(add_bias_linear=True).linear_biases == frozenset(LINEAR_MODULES)
    assert shape(add_qkv_bias=True).linear_biases == {"linear_qkv"}


def test_embeddings_are_tied_by_default() -> None:
    assert shape(untie_embeddings_and_output_weights=False).tied_embeddings


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"swiglu": False}, "trained with swiglu False"),
        ({"normalization": "LayerNorm"}, "normalization 'LayerNorm'"),
        ({"use_rope_scaling": True}, "use_rope_scaling True"),
        ({"num_experts": 8}, "num_experts 8"),
        ({"ffn_hidden_size": None}, "lack ffn_hidden_size"),
        ({"vocab_size": None}, "vocabulary padded to 128 rows"),
    ],
)
def test_what_cannot_be_read_is_named_with_the_way_out(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigurationError, match=f"{told}.*config.json"):
        shape(**changes)


def test_a_checkpoint_without_arguments_is_named() -> None:
    with pytest.raises(ConfigurationError, match="folder does not say what model it is"):
        shape_of_arguments(None, "folder")
