"""A Llama's config.json, in the spellings of several versions of transformers, is one shape."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_peft.config import ConfigurationError
from megatron_peft.models.huggingface_llama import llama_shape
from megatron_peft.models.shape import RopeScaling

SMALLEST: dict[str, Any] = {
    "num_hidden_layers": 2,
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_attention_heads": 3,
    "vocab_size": 11,
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def test_what_is_not_given_is_as_transformers_has_it() -> None:
    shape = llama_shape(SMALLEST)
    assert (shape.num_query_groups, shape.kv_channels, shape.max_position_embeddings) == (3, 4, 2048)
    assert (shape.norm_epsilon, shape.rotary_base, shape.rope_scaling) == (1e-6, 10000.0, None)
    assert not shape.tied_embeddings and shape.linear_biases == frozenset()


def test_each_half_of_a_layer_has_its_own_biases() -> None:
    assert llama_shape(SMALLEST | {"attention_bias": True}).linear_biases == {"linear_qkv", "linear_proj"}
    assert llama_shape(SMALLEST | {"mlp_bias": True}).linear_biases == {"linear_fc1", "linear_fc2"}


@pytest.mark.parametrize(
    "keys",
    [
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
        {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **LLAMA3}},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "partial_rotary_factor": 1, **LLAMA3}},
    ],
    ids=["rope_scaling", "type", "rope_parameters"],
)
def test_rotary_embeddings_are_spelled_in_several_ways(keys: dict[str, Any]) -> None:
    shape = llama_shape(SMALLEST | keys)
    assert shape.rotary_base == 5e5
    assert shape.rope_scaling == RopeScaling(8.0, 1.0, 4.0, 8192)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"num_attention_heads": 5}, "hidden_size 12 is no multiple of num_attention_heads 5, and head_dim is not"),
        ({"head_dim": 5}, "head_dim 5 is odd: rotary embeddings turn features in pairs"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
            "rope_type 'yarn' is not supported. Supported: default",
        ),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_type 'linear' is not supported"),
        ({"rope_scaling": {"rope_type": "llama3", **LLAMA3, "beta": 1}}, "beta of rope_type 'llama3' is not supported"),
        ({"rope_scaling": {"rope_type": "llama3", **LLAMA3, "high_freq_factor": 1.0}}, "1.0 must be above low_freq_f"),
        ({"rope_scaling": "llama3"}, "rope_scaling is 'llama3', not an object"),
    ],
)
def test_what_the_model_cannot_do_is_named(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        llama_shape(SMALLEST | keys)


def test_linear_scaling_by_one_is_none() -> None:
    assert llama_shape(SMALLEST | {"rope_scaling": {"rope_type": "linear", "factor": 1}}).rope_scaling is None
