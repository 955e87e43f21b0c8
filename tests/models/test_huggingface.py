"""A config.json gives the shape that transformers reads from it, or an error that names the key."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_peft.config import ConfigurationError
from megatron_peft.models.huggingface import read_shape
from megatron_peft.models.shape import ModelShape, RopeScaling

# Llama-3.2-1B, as transformers 4 wrote it.
LLAMA_3_2_1B = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.45.0.dev0",
    "use_cache": True,
    "vocab_size": 128256,
}
# A Llama-1 as written in early 2023: most keys did not exist.
LLAMA_7B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "rms_norm_eps": 1e-06,
    "vocab_size": 32000,
}


def write(folder: Path, config: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def shape_with(folder: Path, **changes: Any) -> ModelShape:
    """Shape of the small Llama with some keys changed; None removes a key."""
    return read_shape(write(folder, {k: v for k, v in (LLAMA_3_2_1B | changes).items() if v is not None}))


def test_llama_3_2(tmp_path: Path) -> None:
    assert read_shape(write(tmp_path, LLAMA_3_2_1B)) == ModelShape(
        architecture="llama",
        num_layers=16,
        hidden_size=2048,
        ffn_hidden_size=8192,
        num_attention_heads=32,
        num_query_groups=8,
        kv_channels=64,
        vocab_size=128256,
        max_position_embeddings=131072,
        norm_epsilon=1e-5,
        tied_embeddings=True,
        rotary_base=500000.0,
        rope_scaling=RopeScaling(32.0, 1.0, 4.0, 8192),
    )


def test_absent_keys_have_the_defaults_of_llama(tmp_path: Path) -> None:
    shape = read_shape(write(tmp_path, LLAMA_7B))
    assert (shape.num_query_groups, shape.kv_channels, shape.max_position_embeddings) == (32, 128, 2048)
    assert (shape.norm_epsilon, shape.rotary_base, shape.rope_scaling) == (1e-6, 10000.0, None)
    assert not shape.tied_embeddings and not shape.linear_biases


def test_biases(tmp_path: Path) -> None:
    assert shape_with(tmp_path, attention_bias=True).linear_biases == {"linear_qkv", "linear_proj"}
    assert shape_with(tmp_path, mlp_bias=True).linear_biases == {"linear_fc1", "linear_fc2"}


def test_head_dim_that_is_not_hidden_over_heads(tmp_path: Path) -> None:
    assert shape_with(tmp_path, head_dim=96).kv_channels == 96
    assert shape_with(tmp_path, head_dim=None).kv_channels == 64


def test_rope_parameters_of_transformers_5_equal_the_older_form(tmp_path: Path) -> None:
    older = shape_with(tmp_path)
    parameters = {**LLAMA_3_2_1B["rope_scaling"], "rope_theta": 500000.0}
    assert shape_with(tmp_path, rope_scaling=None, rope_theta=None, rope_parameters=parameters) == older


def test_what_transformers_5_writes_is_read(tmp_path: Path) -> None:
    from transformers import LlamaConfig

    LlamaConfig(**{k: v for k, v in LLAMA_3_2_1B.items() if k != "transformers_version"}).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert "rope_parameters" in written and "rope_scaling" not in written
    assert read_shape(tmp_path) == shape_with(tmp_path)


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        ({"type": "default"}, None),
        ({"rope_type": "default", "rope_theta": 500000.0}, None),
        ({"type": "linear", "factor": 1.0}, None),
        ({**LLAMA_3_2_1B["rope_scaling"], "type": "llama3"}, RopeScaling(32.0, 1.0, 4.0, 8192)),
        (
            {**LLAMA_3_2_1B["rope_scaling"], "original_max_position_embeddings": None},
            RopeScaling(32.0, 1.0, 4.0, 131072),
        ),
    ],
)
def test_rope_scaling(scaling: dict[str, Any], expected: RopeScaling | None, tmp_path: Path) -> None:
    shape = shape_with(tmp_path, rope_scaling=scaling)
    assert shape.rope_scaling == expected
    assert shape.rotary_base == 500000.0


@pytest.mark.parametrize(
    ("scaling", "told"),
    [
        ({"rope_type": "yarn", "factor": 4.0}, "rope_type 'yarn' is not supported"),
        ({"type": "dynamic", "factor": 2.0}, "rope_type 'dynamic' is not supported"),
        ({"type": "linear", "factor": 2.0}, "rope_type 'linear' is not supported"),
        ({"rope_type": "longrope", "short_factor": [1.0]}, "rope_type 'longrope' is not supported"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor of rope_type 'default'"),
        ({"full_attention": {"rope_type": "default"}}, "full_attention of rope_type 'default'"),
        ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}, "high_freq_factor is missing"),
        ({**LLAMA_3_2_1B["rope_scaling"], "high_freq_factor": 1.0}, "high_freq_factor 1.0 must be above"),
        ("llama3", "rope_scaling is 'llama3'"),
    ],
)
def test_rope_scaling_that_is_refused(scaling: Any, told: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=f"config.json: .*{told}"):
        shape_with(tmp_path, rope_scaling=scaling)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_act", "gelu"),
        ("pretraining_tp", 2),
        ("quantization_config", {"quant_method": "gptq", "bits": 4}),
        ("partial_rotary_factor", 0.5),
        ("sliding_window", 4096),
        ("rope_interleaved", True),
        ("final_logit_softcapping", 30.0),
    ],
)
def test_unsupported_keys_are_refused_by_name(key: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=f"asks for what is not supported: {key}="):
        shape_with(tmp_path, **{key: value})


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": "2048"}, "hidden_size is '2048'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"vocab_size": True}, "vocab_size is True"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps is -1.0"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'"),
        ({"num_attention_heads": 30, "head_dim": None}, "hidden_size 2048 is no multiple of num_attention_heads 30"),
        ({"num_key_value_heads": 5}, "32 attention heads cannot share 5 key-value heads"),
        ({"head_dim": 63}, "head_dim 63 is odd"),
    ],
)
def test_impossible_values_are_named(changes: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=f"config.json: {told}"):
        shape_with(tmp_path, **changes)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"model_type": "mistral", "architectures": ["MistralForCausalLM"]},
            "MistralForCausalLM of model_type 'mistral'",
        ),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"model_type": None}, "model_type None"),
    ],
)
def test_other_architectures_are_refused_with_the_supported_ones(
    changes: dict[str, Any], told: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigurationError, match=f"{told}.* not supported. Supported: LlamaForCausalLM"):
        shape_with(tmp_path, **changes)


def test_config_without_architectures_is_read(tmp_path: Path) -> None:
    assert shape_with(tmp_path, architectures=None).architecture == "llama"


def test_unknown_keys_are_ignored_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert shape_with(tmp_path, colour="blue") == shape_with(tmp_path)
    assert "ignored: colour" in caplog.text


def test_known_keys_are_not_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shape_with(tmp_path)
    assert not caplog.records


def test_folders_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="meta-llama/Llama-3 is not a folder"):
        read_shape(tmp_path / "meta-llama/Llama-3")
    with pytest.raises(ConfigurationError, match="holds no config.json"):
        read_shape(tmp_path)


@pytest.mark.parametrize(("text", "told"), [('{"model_type": "lla', "is not JSON"), ("[1]", "no JSON object")])
def test_torn_config(text: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigurationError, match=f"config.json {told}|config.json holds {told}"):
        read_shape(tmp_path)


def test_reading_a_shape_imports_neither_torch_nor_transformers() -> None:
    code = "import sys, megatron_peft.models.huggingface as m; print({'torch', 'transformers'} & set(sys.modules))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "set()"
