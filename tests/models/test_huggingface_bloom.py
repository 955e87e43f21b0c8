"""A Bloom's config.json gives the shape that transformers reads from it, or an error that names the key."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import BloomConfig

from megatron_peft.config import LINEAR_MODULES, ConfigurationError
from megatron_peft.models.huggingface import read_shape
from megatron_peft.models.shape import ModelShape

# bigscience/bloom-7b1 in the keys of its own file.
BLOOM_7B1 = {
    "apply_residual_connection_post_layernorm": False,
    "architectures": ["BloomModel"],
    "attention_dropout": 0.0,
    "attention_softmax_in_fp32": True,
    "bias_dropout_fusion": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_dropout": 0.0,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "masked_softmax_fusion": True,
    "model_type": "bloom",
    "n_embed": 4096,
    "n_inner": None,
    "n_layer": 30,
    "num_attention_heads": 32,
    "offset_alibi": 100,
    "pad_token_id": 3,
    "pretraining_tp": 4,
    "seq_length": 2048,
    "skip_bias_add": True,
    "skip_bias_add_qkv": False,
    "slow_but_exact": False,
    "unk_token_id": 0,
    "use_cache": True,
    "vocab_size": 250880,
}
SHAPE = ModelShape(
    architecture="bloom",
    num_layers=30,
    hidden_size=4096,
    ffn_hidden_size=16384,
    num_attention_heads=32,
    num_query_groups=32,
    kv_channels=128,
    vocab_size=250880,
    max_position_embeddings=2048,
    normalization="LayerNorm",
    norm_epsilon=1e-5,
    activation="gelu_tanh",
    gated_linear_unit=False,
    linear_biases=frozenset(LINEAR_MODULES),
    tied_embeddings=True,
    position_embedding="alibi",
    embedding_layernorm=True,
)


def shape_with(folder: Path, **changes: Any) -> ModelShape:
    """Shape of BLOOM_7B1 with some keys changed; None removes a key."""
    config = {key: value for key, value in (BLOOM_7B1 | changes).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    return read_shape(folder)


def test_the_keys_of_bigscience(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert shape_with(tmp_path) == SHAPE
    assert not caplog.records


def test_the_keys_of_transformers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    BloomConfig(vocab_size=250880, hidden_size=4096, n_layer=30, n_head=32, pretraining_tp=4).save_pretrained(tmp_path)
    assert "n_head" in json.loads((tmp_path / "config.json").read_text())
    assert read_shape(tmp_path) == SHAPE
    assert not caplog.records


def test_each_size_goes_by_any_of_its_names(tmp_path: Path) -> None:
    renamed = {"num_hidden_layers": 30, "n_layer": None, "n_head": 32, "num_attention_heads": None, "hidden_size": 4096}
    assert shape_with(tmp_path, **renamed, n_embed=None) == SHAPE
    assert shape_with(tmp_path, **renamed) == SHAPE


def test_what_may_differ(tmp_path: Path) -> None:
    changes = {"layer_norm_epsilon": 1e-6, "tie_word_embeddings": False, "seq_length": 4096, "n_inner": 16384}
    expected = replace(SHAPE, norm_epsilon=1e-6, tied_embeddings=False, max_position_embeddings=4096)
    assert shape_with(tmp_path, **changes) == expected


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"apply_residual_connection_post_layernorm": True}, "apply_residual_connection_post_layernorm=true"),
        ({"quantization_config": {"bits": 8}}, "quantization_config="),
        ({"n_layer": None}, r"n_layer \(or num_hidden_layers\) is missing"),
        ({"n_head": 16}, "n_head 16 and num_attention_heads 32 are the same thing and differ"),
        ({"hidden_size": 2048}, "hidden_size 2048 and n_embed 4096 are the same thing"),
        ({"num_attention_heads": 30}, "hidden_size 4096 is no multiple of the 30 attention heads"),
        ({"n_inner": 1000}, "n_inner is 1000; Bloom's MLP has 4 x 4096 = 16384 features"),
        ({"vocab_size": "many"}, "vocab_size is 'many'"),
        ({"architectures": ["BloomForSequenceClassification"]}, "BloomForSequenceClassification .*BloomForCausalLM"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=f"config.json.*{told}"):
        shape_with(tmp_path, **changes)


def test_a_switch_that_drops_biases_in_transformers_is_ignored_aloud(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert shape_with(tmp_path, slow_but_exact=True, pretraining_tp=1) == SHAPE
    assert not caplog.records
    assert shape_with(tmp_path, slow_but_exact=True) == SHAPE
    assert "slow_but_exact is ignored" in caplog.text
