"""A config.json gives the shape that transformers reads from it, or an error that names the key."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from megatron_peft.config import LINEAR_MODULES, ConfigurationError
from megatron_peft.models.families import config_of_shape, read_shape
from megatron_peft.models.shape import ModelShape, RopeScaling

# As transformers 4 wrote them; a Llama of early 2023, when most keys did not exist; Bloom in the keys of its own file.
ROPE = {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192}
LLAMA3 = {**ROPE, "rope_type": "llama3"}
NEW_ROPE = {**LLAMA3, "rope_theta": 500000.0, "partial_rotary_factor": 1}
LENGTH = "original_max_position_embeddings"
LLAMA_3_2_1B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16", "use_cache": True,
    "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000, "eos_token_id": 128001,
    "head_dim": 64, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
    "intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": False, "num_attention_heads": 32,
    "num_hidden_layers": 16, "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
    "rope_scaling": LLAMA3, "rope_theta": 500000.0, "tie_word_embeddings": True, "vocab_size": 128256,
}  # fmt: skip
LLAMA_7B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008,
    "num_attention_heads": 32, "num_hidden_layers": 32, "rms_norm_eps": 1e-06, "vocab_size": 32000,
}  # fmt: skip
BLOOM_7B1 = {
    "architectures": ["BloomModel"], "model_type": "bloom", "n_embed": 4096, "n_inner": None, "n_layer": 30,
    "num_attention_heads": 32, "seq_length": 2048, "vocab_size": 250880, "layer_norm_epsilon": 1e-05,
    "apply_residual_connection_post_layernorm": False, "attention_softmax_in_fp32": True, "use_cache": True,
    "bias_dropout_fusion": True, "masked_softmax_fusion": True, "offset_alibi": 100, "pretraining_tp": 4,
    "skip_bias_add": True, "skip_bias_add_qkv": False, "slow_but_exact": False, "initializer_range": 0.02,
    "attention_dropout": 0.0, "hidden_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3,
}  # fmt: skip
SCALING = RopeScaling(32.0, 1.0, 4.0, 8192)
LLAMA_SHAPE = ModelShape(
    "llama", 16, 2048, 8192, 32, 8, 64, 128256, 131072,
    norm_epsilon=1e-5, tied_embeddings=True, rotary_base=500000.0, rope_scaling=SCALING,
)  # fmt: skip
BLOOM_SHAPE = ModelShape(
    "bloom", 30, 4096, 16384, 32, 32, 128, 250880, 2048,
    normalization="LayerNorm", norm_epsilon=1e-5, activation="gelu_tanh", gated_linear_unit=False,
    linear_biases=frozenset(LINEAR_MODULES), tied_embeddings=True, position_embedding="alibi", embedding_layernorm=True,
)  # fmt: skip


def llama(folder: Path, base: dict[str, Any] = LLAMA_3_2_1B, /, **changes: Any) -> ModelShape:
    """Shape of the small Llama with some keys changed; None removes a key."""
    return read_shape(written(folder, {key: value for key, value in (base | changes).items() if value is not None}))


def written(folder: Path, config: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def bloom(folder: Path, **changes: Any) -> ModelShape:
    return llama(folder, BLOOM_7B1, **changes)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"attention_bias": True}, {"linear_biases": {"linear_qkv", "linear_proj"}}),
        ({"mlp_bias": True}, {"linear_biases": {"linear_fc1", "linear_fc2"}}),
        ({"head_dim": 96}, {"kv_channels": 96}),  # not hidden / heads
        ({"head_dim": None}, {}),
        ({"architectures": None}, {}),
        ({"rope_scaling": {"type": "default"}}, {"rope_scaling": None}),
        ({"rope_scaling": {"rope_type": "default", "rope_theta": 500000.0}}, {"rope_scaling": None}),
        ({"rope_scaling": {"type": "linear", "factor": 1.0}}, {"rope_scaling": None}),
        ({"rope_scaling": {"type": "llama3", **ROPE}}, {}),
        ({"rope_scaling": {**LLAMA3, LENGTH: None}}, {"rope_scaling": replace(SCALING, **{LENGTH: 131072})}),
        ({"rope_scaling": None, "rope_theta": None, "rope_parameters": NEW_ROPE}, {}),
    ],
)
def test_what_may_differ_in_a_llama(changes: dict[str, Any], expected: dict[str, Any], tmp_path: Path) -> None:
    assert llama(tmp_path, **changes) == replace(LLAMA_SHAPE, **expected)


def test_what_may_differ_in_a_bloom(tmp_path: Path) -> None:
    """Each size is read from any of its keys."""
    renamed = {"num_hidden_layers": 30, "n_layer": None, "n_head": 32, "num_attention_heads": None, "hidden_size": 4096}
    assert bloom(tmp_path, **renamed, n_embed=None) == bloom(tmp_path, **renamed) == BLOOM_SHAPE
    changes = {"layer_norm_epsilon": 1e-6, "tie_word_embeddings": False, "seq_length": 4096, "n_inner": 16384}
    expected = replace(BLOOM_SHAPE, norm_epsilon=1e-6, tied_embeddings=False, max_position_embeddings=4096)
    assert bloom(tmp_path, **changes) == expected


COUNT = "it must be a whole number above 0"
SUPPORTED = ".* not supported. Supported: LlamaForCausalLM, BloomForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Q"
UNSUPPORTED_KEYS = (
    "hidden_act pretraining_tp partial_rotary_factor sliding_window rope_interleaved "
    "final_logit_softcapping pruned_heads"
)
REFUSED_SCALING = [
    ({"rope_type": "yarn", "factor": 4.0}, "rope_type 'yarn' is not supported. Supported: default.* remove rope_sc"),
    ({"type": "linear", "factor": 2.0}, "rope_type 'linear' is not supported"),
    ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor of rope_type 'default'"),
    ({"full_attention": {"rope_type": "default"}}, "full_attention of rope_type 'default'"),
    ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}, "high_freq_factor is missing"),
    ({**LLAMA3, "high_freq_factor": 1.0}, "high_freq_factor 1.0 must be above"),
    ({**LLAMA3, "beta": 1}, "beta of rope_type 'llama3' is not supported"),
    ("llama3", "rope_scaling is 'llama3', not an object"),
]


REFUSED_LLAMA = [
    *(({"rope_scaling": scaling}, told) for scaling, told in REFUSED_SCALING),
    *(({key: 30.0}, f"uses unsupported settings: {key}=") for key in UNSUPPORTED_KEYS.split()),
    ({"hidden_size": None}, "hidden_size is missing"),
    ({"hidden_size": "2048"}, f"hidden_size is '2048'; {COUNT}"),
    ({"num_hidden_layers": 2.0}, f"num_hidden_layers is 2.0; {COUNT}"),
    ({"rms_norm_eps": True}, "rms_norm_eps is True; it must be a number above 0"),
    ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1; it must be true or false"),
    ({"num_attention_heads": 30, "head_dim": None}, "hidden_size 2048 is not a multiple of num_attention_heads 30"),
    ({"num_key_value_heads": 5}, "32 attention heads cannot share 5 key-value heads"),
    ({"head_dim": 63}, "head_dim 63 is odd"),
    ({"model_type": "gemma", "architectures": ["Gemma"]}, f"Gemma of model_type 'gemma'{SUPPORTED}"),
    ({"architectures": ["LlamaForSequenceClassification"]}, f"LlamaForSequenceClassification{SUPPORTED}"),
]


def test_unknown_keys_are_ignored_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert llama(tmp_path, color="blue") == LLAMA_SHAPE
    assert "ignored: color" in caplog.text


REFUSED_BLOOM = [
    ({"apply_residual_connection_post_layernorm": True}, "apply_residual_connection_post_layernorm=true"),
    ({"quantization_config": {"bits": 8}}, "quantization_config: an unknown method"),
    ({"n_layer": None}, r"n_layer \(or num_hidden_layers\) is missing"),
    ({"n_head": 16}, "n_head 16 and num_attention_heads 32 are the same thing and differ"),
    ({"hidden_size": 2048}, "hidden_size 2048 and n_embed 4096 are the same thing"),
    ({"num_attention_heads": 30}, "hidden_size 4096 is not a multiple of the 30 attention heads"),
    ({"n_inner": 1000}, "n_inner is 1000; Bloom's MLP has 4 x 4096 = 16384 features"),
    ({"n_layer": 10**5, "num_hidden_layers": None}, "n_layer is 100000; .* at most 99,999"),
    ({"layer_norm_epsilon": 2.0}, "layer_norm_epsilon is 2.0; .* at most 1"),
    ({"hidden_size": 2**31, "n_embed": None}, f"hidden_size is {2**31}; .* at most 2,147,483,647"),
    ({"architectures": ["BloomForSequenceClassification"]}, "BloomForSequenceClassification .*BloomForCausalLM"),
]


def test_a_switch_that_drops_biases_in_transformers_is_ignored_with_a_warning(tmp_path: Path, caplog) -> None:
    assert bloom(tmp_path, slow_but_exact=True, pretraining_tp=1) == BLOOM_SHAPE
    assert not caplog.records
    assert bloom(tmp_path, slow_but_exact=True) == BLOOM_SHAPE
    assert "slow_but_exact is ignored" in caplog.text


# As their owners published them, without what any config.json has.
MISTRAL_7B_V01 = {
    "architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_act": "silu", "hidden_size": 4096,
    "intermediate_size": 14336, "max_position_embeddings": 32768, "num_attention_heads": 32, "num_hidden_layers": 32,
    "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096,
    "tie_word_embeddings": False, "vocab_size": 32000,
}  # fmt: skip
MISTRAL_7B_V03 = {**MISTRAL_7B_V01, "rope_theta": 1e6, "sliding_window": None, "vocab_size": 32768}
MISTRAL_NEMO = {
    **MISTRAL_7B_V03, "head_dim": 128, "hidden_size": 5120, "num_hidden_layers": 40, "vocab_size": 131072,
    "max_position_embeddings": 1024000,
}  # fmt: skip
QWEN25_7B = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu", "hidden_size": 3584,
    "intermediate_size": 18944, "max_position_embeddings": 131072, "max_window_layers": 28, "num_attention_heads": 28,
    "num_hidden_layers": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
    "sliding_window": 131072, "tie_word_embeddings": False, "use_mrope": False, "use_sliding_window": False,
    "vocab_size": 152064,
}  # fmt: skip
QWEN3_06B = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "attention_bias": False, "head_dim": 128,
    "hidden_act": "silu", "hidden_size": 1024, "intermediate_size": 3072, "max_position_embeddings": 40960,
    "max_window_layers": 28, "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None,
    "tie_word_embeddings": True, "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
PUBLISHED = [
    (LLAMA_3_2_1B, LLAMA_SHAPE),
    (LLAMA_7B, ModelShape("llama", 32, 4096, 11008, 32, 32, 128, 32000, 2048, norm_epsilon=1e-6)),
    (BLOOM_7B1, BLOOM_SHAPE),
    (MISTRAL_7B_V01, ModelShape("mistral", 32, 4096, 14336, 32, 8, 128, 32000, 32768, sliding_window=4096)),
    (MISTRAL_7B_V03, ModelShape("mistral", 32, 4096, 14336, 32, 8, 128, 32768, 32768, rotary_base=1e6)),
    (MISTRAL_NEMO, ModelShape("mistral", 40, 5120, 14336, 32, 8, 128, 131072, 1024000, rotary_base=1e6)),
    (
        QWEN25_7B,
        ModelShape(
            "qwen2", 28, 3584, 18944, 28, 4, 128, 152064, 131072,
            norm_epsilon=1e-6, rotary_base=1e6, linear_biases=frozenset({"linear_qkv"}),
        ),
    ),
    (
        QWEN3_06B,
        ModelShape(
            "qwen3", 28, 1024, 3072, 16, 8, 128, 151936, 40960,
            norm_epsilon=1e-6, rotary_base=1e6, tied_embeddings=True, qk_layernorm=True,
        ),
    ),
]  # fmt: skip


FULL = ["full_attention"]


@pytest.mark.parametrize(("config", "expected"), PUBLISHED)
def test_published_models_are_read_without_a_warning(config, expected, tmp_path: Path, caplog) -> None:
    """Also as transformers 5 writes it."""
    assert read_shape(written(tmp_path, config)) == expected
    AutoConfig.from_pretrained(tmp_path).save_pretrained(tmp_path)
    assert read_shape(tmp_path) == expected
    assert not caplog.records


@pytest.mark.parametrize(
    "config",
    [{key: MISTRAL_7B_V01[key] for key in ("architectures", "model_type")}]
    + [{**base, "use_sliding_window": True, "sliding_window": 4096} for base in (QWEN25_7B, QWEN3_06B)]
    + [{key: QWEN25_7B[key] for key in ("architectures", "model_type")} | {"use_sliding_window": True}]
    + [{key: QWEN3_06B[key] for key in ("architectures", "model_type")}],
)
def test_absent_keys_of_mistral_and_qwen_have_the_values_of_transformers(config, tmp_path: Path) -> None:
    theirs = AutoConfig.from_pretrained(written(tmp_path, config))
    sizes = "hidden_size intermediate_size num_hidden_layers num_attention_heads vocab_size".split()
    ours = read_shape(written(tmp_path, {**{name: getattr(theirs, name) for name in sizes}, **config}))
    kinds = getattr(theirs, "layer_types", None) or ["sliding_attention"] * theirs.num_hidden_layers
    num_full = kinds.count("full_attention")
    assert (ours.sliding_window, ours.num_full_attention_layers) == (
        (None, 0) if num_full == len(kinds) else (theirs.sliding_window, num_full)
    )
    assert ours.num_query_groups == theirs.num_key_value_heads
    assert ours.max_position_embeddings == theirs.max_position_embeddings
    assert ours.kv_channels == getattr(theirs, "head_dim", theirs.hidden_size // theirs.num_attention_heads)
    assert (ours.norm_epsilon, ours.rotary_base) == (theirs.rms_norm_eps, theirs.rope_parameters["rope_theta"])


@pytest.mark.parametrize(
    ("base", "changes", "expected"),
    [
        (QWEN25_7B, {"use_sliding_window": True}, (None, 0)),  # from layer 28 on, of 28
        (QWEN25_7B, {"use_sliding_window": True, "max_window_layers": 0}, (131072, 0)),
        (QWEN3_06B, {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 20}, (64, 20)),
        (QWEN3_06B, {"layer_types": FULL * 28}, (None, 0)),
        (QWEN25_7B, {"use_sliding_window": True, "max_window_layers": 0, "sliding_window": None}, (None, 0)),
        (QWEN25_7B, {"use_sliding_window": True, "layer_types": [*FULL * 27, "sliding_attention"]}, (131072, 27)),
        (MISTRAL_7B_V03, {"sliding_window": 8192}, (8192, 0)),
    ],
)
def test_windows_and_the_layers_that_have_them(base, changes, expected, tmp_path: Path) -> None:
    shape = read_shape(written(tmp_path, base | changes))
    assert (shape.sliding_window, shape.num_full_attention_layers) == expected
    written(tmp_path, config_of_shape(shape))
    assert read_shape(tmp_path) == shape


@pytest.mark.parametrize(
    ("base", "changes", "told"),
    [
        *((LLAMA_3_2_1B, changes, told) for changes, told in REFUSED_LLAMA),
        *((BLOOM_7B1, changes, told) for changes, told in REFUSED_BLOOM),
        (MISTRAL_7B_V01, {"layer_types": ["full_attention"] * 32}, "unsupported settings: layer_types="),
        (MISTRAL_7B_V01, {"sliding_window": 0}, f"sliding_window is 0; {COUNT}"),
        (MISTRAL_7B_V01, {"architectures": ["MistralForSequenceClassification"]}, "not supported"),
        (QWEN25_7B, {"use_mrope": True}, "use_mrope=true"),
        (QWEN25_7B, {"max_window_layers": -1, "use_sliding_window": True}, f"max_window_layers is -1; {COUNT}"),
        (QWEN25_7B, {"layer_types": ["full_attention", "sliding_attention"] * 14}, "must be full_attention"),
        (QWEN25_7B, {"layer_types": ["sliding_attention"] * 28}, "which needs use_sliding_window"),
        (QWEN25_7B, {"layer_types": ["full_attention"] * 3}, "not a list of 28 names"),
        (QWEN25_7B, {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "as YaRN does Qwen"),
        (QWEN3_06B, {"head_dim": 127}, "head_dim 127 is odd"),
        (QWEN3_06B, {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"}, "'qwen3_moe', which is not"),
    ],
)
def test_configs_that_are_refused(base: dict[str, Any], changes: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=f"config.json.*{told}"):
        llama(tmp_path, base, **changes)


def test_folders_that_hold_no_config_are_named(tmp_path: Path) -> None:
    downloaded = "give the folder of a downloaded model, or ORG/NAME of the Hub"
    for folder, told in (
        (tmp_path / "Llama-3", f"Llama-3 is not a folder: {downloaded}"),
        ("Llama-3", "Llama-3 is not a folder: a model of the Hugging Face Hub is named ORG/NAME, as in "),
        (tmp_path, "holds no config.json"),
    ):
        with pytest.raises(ConfigurationError, match=told):
            read_shape(folder)
