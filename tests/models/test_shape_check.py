"""Flags and layout held against a model: every contradiction is told, with both values or the valid ones."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from megatron_peft.config import DataConfig, ParallelConfig
from megatron_peft.models.shape import ModelShape, RopeScaling
from megatron_peft.models.shape_check import check_layout, check_lengths, compare_shape

LLAMA = ModelShape(
    architecture="llama",
    num_layers=12,
    hidden_size=96,
    ffn_hidden_size=288,
    num_attention_heads=12,
    num_query_groups=6,
    kv_channels=8,
    vocab_size=1000,
    max_position_embeddings=2048,
    rope_scaling=RopeScaling(factor=8.0),
)
BLOOM = replace(
    LLAMA,
    architecture="bloom",
    num_query_groups=12,
    normalization="LayerNorm",
    activation="gelu_tanh",
    gated_linear_unit=False,
    linear_biases=frozenset({"linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"}),
    tied_embeddings=True,
    position_embedding="alibi",
    rope_scaling=None,
)
LLAMA_FLAGS = {
    "num_layers": 12,
    "hidden_size": 96,
    "ffn_hidden_size": 288,
    "num_attention_heads": 12,
    "group_query_attention": True,
    "num_query_groups": 6,
    "kv_channels": 8,
    "vocab_size": 1000,
    "max_position_embeddings": 2048,
    "normalization": "RMSNorm",
    "norm_epsilon": 1e-5,
    "position_embedding_type": "rope",
    "use_rotary_position_embeddings": True,
    "rotary_base": 10000.0,
    "rotary_percent": 1.0,
    "use_rope_scaling": True,
    "rope_scaling_factor": 8.0,
    "swiglu": True,
    "disable_bias_linear": True,
    "untie_embeddings_and_output_weights": True,
}


def layout(tp: int = 1, pp: int = 1, **stages: int) -> ParallelConfig:
    return ParallelConfig(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, world_size=tp * pp, **stages)


def test_flags_that_agree_say_nothing() -> None:
    assert compare_shape(LLAMA_FLAGS, LLAMA) == []
    biased = replace(LLAMA, linear_biases=frozenset({"linear_qkv"}))
    assert compare_shape({"disable_bias_linear": True, "add_qkv_bias": True}, biased) == []
    assert compare_shape({"openai_gelu": True, "add_qkv_bias": True, "normalization": "LayerNorm"}, BLOOM) == []


@pytest.mark.parametrize("name", LLAMA_FLAGS.keys() - {"kv_channels"})
def test_each_flag_can_contradict(name: str) -> None:
    flags = {name: LLAMA_FLAGS[name]}
    other = replace(
        BLOOM, num_layers=24, hidden_size=192, ffn_hidden_size=768, num_attention_heads=24, num_query_groups=24
    )
    other = replace(other, vocab_size=999, max_position_embeddings=1024, norm_epsilon=1e-6)
    (problem,) = compare_shape(flags, other)
    assert problem.startswith(f"--{name.replace('_', '-')} ")


def test_both_values_are_named() -> None:
    (problem,) = compare_shape({"num_layers": 32}, LLAMA)
    assert "--num-layers 32 " in problem and " 12" in problem
    (problem,) = compare_shape({"norm_epsilon": 1e-6}, LLAMA)
    assert "1e-06" in problem and "1e-05" in problem


def test_all_contradictions_are_told() -> None:
    assert (
        len(compare_shape({"num_layers": 1, "hidden_size": 1, "openai_gelu": True, "add_qkv_bias": True}, LLAMA)) == 4
    )


def test_number_of_groups_says_more_than_grouping() -> None:
    """Megatron's scripts give both, also for as many groups as heads."""
    assert compare_shape({"group_query_attention": True, "num_query_groups": 12}, BLOOM) == []
    assert len(compare_shape({"group_query_attention": True}, BLOOM)) == 1


def test_layouts_that_fit_say_nothing() -> None:
    fitting = [layout(), layout(tp=6), layout(pp=4), layout(tp=2, pp=3, num_layers_per_virtual_pipeline_stage=2)]
    fitting += [layout(pp=4, decoder_first_pipeline_num_layers=2, decoder_last_pipeline_num_layers=4)]
    fitting += [layout(pp=2, decoder_first_pipeline_num_layers=5)]
    fitting += [layout(pp=2, decoder_first_pipeline_num_layers=5, decoder_last_pipeline_num_layers=7)]
    assert [check_layout(one, LLAMA) for one in fitting] == [[]] * len(fitting)


@pytest.mark.parametrize(
    ("parallel", "expected"),
    [
        (
            layout(tp=4),
            "--tensor-model-parallel-size 4 does not divide the model's 6 key-value heads: use 1, 2, 3 or 6.",
        ),
        (layout(tp=5), "12 attention heads, 6 key-value heads, 96 hidden features, 288 MLP features"),
        (layout(pp=5), "--pipeline-model-parallel-size 5 does not divide the model's 12 layers: use 1, 2, 3, 4, 6 or"),
        (layout(pp=2, num_layers_per_virtual_pipeline_stage=4), "the 6 layers of a stage .* use 1, 2, 3 or 6"),
        (
            layout(pp=3, decoder_first_pipeline_num_layers=3),
            "--decoder-first-pipeline-num-layers 3 leave 9 .* other 2 pipeline stages: use 2, 4, 6, 8 or 10 layers",
        ),
        (
            layout(pp=2, decoder_first_pipeline_num_layers=5, decoder_last_pipeline_num_layers=5),
            "leave 2 .* other 0 pipeline stages: use 12 layers",
        ),
        (layout(pp=2, decoder_last_pipeline_num_layers=12), "leave 0 of the model's 12 layers"),
    ],
)
def test_layouts_that_do_not_fit_list_what_does(parallel: ParallelConfig, expected: str) -> None:
    (problem,) = check_layout(parallel, LLAMA)
    assert re.search(expected, problem), problem


def test_tensor_and_pipeline_problems_are_told_together() -> None:
    assert len(check_layout(layout(tp=4, pp=5), LLAMA)) == 2


def test_samples_longer_than_rotary_positions_are_told() -> None:
    data = DataConfig(train_data_path=("a.jsonl",), seq_length=4096)
    (problem,) = check_lengths(data, LLAMA)
    assert "--seq-length 4096" in problem and "2048" in problem
    assert check_lengths(data, BLOOM) == []
    assert check_lengths(replace(data, seq_length=2048), LLAMA) == []


def test_default_length_of_samples_contradicts_no_model() -> None:
    small = replace(LLAMA, max_position_embeddings=64)
    assert check_lengths(DataConfig(train_data_path=("a.jsonl",)), small) == []
    assert len(check_lengths(DataConfig(train_data_path=("a.jsonl",), seq_length=65), small)) == 1
