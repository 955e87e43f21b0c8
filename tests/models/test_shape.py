"""Flags and layouts are compared with a model's shape: errors name both values, or the valid ones."""

import re
from dataclasses import replace
from typing import Any

import pytest

from megatron_peft.config import LINEAR_MODULES, ConfigurationError, DataConfig, ModelConfig, ParallelConfig
from megatron_peft.models.shape import (
    MOST,
    ModelShape,
    RopeScaling,
    check_layout,
    check_lengths,
    check_quantized,
    compare_shape,
)

LLAMA = ModelShape("llama", 12, 96, 288, 12, 6, 8, 1000, 2048, rope_scaling=RopeScaling(factor=8.0))
ACCOUNTED = dict.fromkeys(("account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split"), True)
BLOOM = ModelShape(
    "bloom", 12, 96, 288, 12, 12, 8, 1000, 2048, normalization="LayerNorm", activation="gelu_tanh",
    gated_linear_unit=False, linear_biases=frozenset(LINEAR_MODULES), tied_embeddings=True, position_embedding="alibi",
)  # fmt: skip
LLAMA_FLAGS = {
    "num_layers": 12, "hidden_size": 96, "ffn_hidden_size": 288, "num_attention_heads": 12,
    "group_query_attention": True, "num_query_groups": 6, "kv_channels": 8, "vocab_size": 1000,
    "max_position_embeddings": 2048, "normalization": "RMSNorm", "norm_epsilon": 1e-5,
    "position_embedding_type": "rope", "use_rotary_position_embeddings": True, "rotary_base": 10000.0,
    "rotary_percent": 1.0, "use_rope_scaling": True, "rope_scaling_factor": 8.0, "swiglu": True,
    "disable_bias_linear": True, "untie_embeddings_and_output_weights": True,
}  # fmt: skip


def layout(tp: int = 1, pp: int = 1, first: int | None = None, last: int | None = None, **more: Any) -> ParallelConfig:
    stages = {"decoder_first_pipeline_num_layers": first, "decoder_last_pipeline_num_layers": last, **more}
    return ParallelConfig(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, world_size=tp * pp, **stages)


def test_the_vocabulary_is_padded_to_equal_multiples_on_every_rank():
    cases = {(37, 1, 1): 37, (37, 8, 1): 40, (40, 8, 1): 40, (37, 1, 3): 39, (37, 8, 3): 48, (49152, 128, 3): 49152}
    for (vocab_size, multiple, size), expected in cases.items():
        assert replace(LLAMA, vocab_size=vocab_size).padded_vocab_size(multiple, size) == expected


def test_flags_that_agree_say_nothing() -> None:
    assert compare_shape(LLAMA_FLAGS, LLAMA) == []
    biased = replace(LLAMA, linear_biases=frozenset({"linear_qkv"}))
    assert compare_shape({"disable_bias_linear": True, "add_qkv_bias": True}, biased) == []
    assert compare_shape({"qk_layernorm": True}, replace(LLAMA, qk_layernorm=True)) == []
    assert compare_shape({"openai_gelu": True, "add_qkv_bias": True, "normalization": "LayerNorm"}, BLOOM) == []
    # Megatron's scripts say both, also for as many groups as heads.
    assert compare_shape({"group_query_attention": True, "num_query_groups": 12}, BLOOM) == []


@pytest.mark.parametrize("name", sorted(LLAMA_FLAGS.keys() - {"kv_channels"}))
def test_each_flag_can_contradict(name: str) -> None:
    sizes = {"num_layers": 24, "hidden_size": 192, "ffn_hidden_size": 768, "vocab_size": 999, "norm_epsilon": 1e-6}
    heads = {"num_attention_heads": 24, "num_query_groups": 24, "max_position_embeddings": 1024}
    (problem,) = compare_shape({name: LLAMA_FLAGS[name]}, replace(BLOOM, **sizes, **heads))
    assert problem.startswith(f"--{name.replace('_', '-')} ")


def test_all_contradictions_are_reported_with_both_values() -> None:
    flags = {"num_layers": 32, "norm_epsilon": 1e-6, "openai_gelu": True, "add_qkv_bias": True, "qk_layernorm": True}
    layers, epsilon, *others = compare_shape(flags, LLAMA)
    assert "--num-layers 32 " in layers and " 12" in layers
    assert "1e-06" in epsilon and "1e-05" in epsilon
    assert len(others) == 3


def test_layouts_that_fit_say_nothing() -> None:
    uneven = [{"first": 2, "last": 4, "pp": 4}, {"first": 5}, {"first": 5, "last": 7}]
    fitting = [layout(), layout(tp=6), layout(pp=4), layout(tp=2, pp=3, num_layers_per_virtual_pipeline_stage=2)]
    fitting += [layout(**{"pp": 2, **stages}) for stages in uneven]
    fitting += [layout(pp=2, num_layers_per_virtual_pipeline_stage=7, **ACCOUNTED)]
    fitting += [layout(pp=2, pipeline_model_parallel_layout="E(t|)*11tL")]
    assert [check_layout(one, LLAMA) for one in fitting] == [[]] * len(fitting)


@pytest.mark.parametrize(
    ("parallel", "expected"),
    [
        (layout(tp=4), "--tensor-model-parallel-size 4 .* 6 key-value heads: use 1, 2, 3 or 6."),
        (layout(tp=5), "12 attention heads, 6 key-value heads, 96 hidden features, 288 MLP features"),
        (layout(pp=5), "--pipeline-model-parallel-size 5 does not divide the model's 12 layers: use 1, 2, 3, 4, 6 or"),
        (layout(pp=2, num_layers_per_virtual_pipeline_stage=4), "the 6 layers of a stage .* use 1, 2, 3 or 6"),
        (layout(pp=4, **ACCOUNTED), "4 does not divide the model's 12 layers .2 more accounted for.: use 1, 2, 7"),
        (layout(pp=2, num_layers_per_virtual_pipeline_stage=2, **ACCOUNTED), "the 7 layers of a stage .*: use 1 or 7"),
        (layout(pp=2, pipeline_model_parallel_layout="Et*5|t*6L"), "has 11 layers .t., the model 12"),
        (layout(pp=3, first=3), "--decoder-first-.* 3 leave 9 .* other 2 pipeline stages: use 2, 4, 6, 8 or 10 layers"),
        (layout(pp=2, first=5, last=5), "leave 2 .* other 0 pipeline stages: use 12 layers"),
        (layout(pp=2, last=12), "leave 0 of the model's 12 layers"),
    ],
)
def test_layouts_that_do_not_fit_list_what_does(parallel: ParallelConfig, expected: str) -> None:
    (problem,) = check_layout(parallel, LLAMA)
    assert re.search(expected, problem), problem
    assert len(check_layout(layout(tp=4, pp=5), LLAMA)) == 2  # both are told together


NF4 = ModelConfig("base", base_precision="nf4")


def test_a_block_that_is_cut_names_the_sizes_that_cut_none() -> None:
    shape = replace(LLAMA, hidden_size=192, num_attention_heads=12, num_query_groups=12, kv_channels=64)
    shape = replace(shape, ffn_hidden_size=768)
    assert [size for size in range(1, 13) if not check_quantized(NF4, size, shape)] == [1, 2, 3, 4, 6, 12]
    (problem,) = check_quantized(NF4, 12, replace(shape, ffn_hidden_size=384))
    assert "--base-precision nf4 has blocks of 64" in problem and problem.endswith(
        "12 parts of whole blocks: use 1, 2, 3 or 6."
    )
    (problem,) = check_quantized(replace(NF4, base_precision="fp8"), 1, replace(shape, hidden_size=96))
    assert "have 96 and 768, which are no multiples" in problem
    assert check_quantized(replace(NF4, base_precision="run"), 5, shape) == []
    of_heads = replace(shape, num_attention_heads=2, num_query_groups=2, ffn_hidden_size=64 * 12)  # 2 x 64 of attention
    assert [size for size in range(1, 13) if not check_quantized(NF4, size, of_heads)] == [1, 2]


def test_an_output_layer_that_is_the_embedding_is_not_quantized() -> None:
    model, shape = replace(NF4, quantize_output_layer=True), replace(LLAMA, kv_channels=64, ffn_hidden_size=128)
    (problem,) = check_quantized(model, 1, replace(shape, tied_embeddings=True))
    assert "tie_word_embeddings" in problem and problem.endswith("which stays as it is: leave it out.")
    assert not any("output" in told for told in check_quantized(model, 1, replace(shape, tied_embeddings=False)))


def test_divisors_of_a_huge_prime_are_found_at_once() -> None:
    huge = replace(LLAMA, **dict.fromkeys(("num_attention_heads", "num_query_groups"), MOST), hidden_size=MOST)
    (problem,) = check_layout(layout(tp=2), replace(huge, ffn_hidden_size=MOST))
    assert problem.endswith(f"use 1 or {MOST}.")


@pytest.mark.parametrize(
    "changes",
    [{"num_layers": 10**5}, {"hidden_size": 2**31}, {"num_query_groups": 0}, {"vocab_size": 1e3}, {"kv_channels": "8"}]
    + [{"sliding_window": 0}]
    + [{"norm_epsilon": value} for value in (0.0, 2.0, float("nan"), "1e-5")]
    + [{"rotary_base": value} for value in (float("inf"), -1.0, 1e39)],
)
def test_no_shape_has_sizes_or_numbers_that_mean_nothing(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=f"shape cannot have {next(iter(changes))}"):
        replace(LLAMA, **changes)


def test_samples_longer_than_rotary_positions_are_reported_unless_their_length_is_the_default() -> None:
    (problem,) = check_lengths(DataConfig(seq_length=4096), LLAMA)
    assert "--seq-length 4096" in problem and "2048" in problem
    assert check_lengths(DataConfig(seq_length=4096), BLOOM) == check_lengths(DataConfig(seq_length=2048), LLAMA) == []
    small = replace(LLAMA, max_position_embeddings=64)
    assert check_lengths(DataConfig(), small) == []
    assert len(check_lengths(DataConfig(seq_length=65), small)) == 1


def test_a_window_that_is_shorter_than_the_samples_is_refused_with_the_length_that_fits() -> None:
    """Where nothing is trained, the default length says nothing."""
    windowed = replace(LLAMA, sliding_window=512, num_full_attention_layers=4)
    trains: dict[str, Any] = {"train_data_path": ("train.jsonl",)}
    problem = "".join(check_lengths(DataConfig(seq_length=513, **trains), windowed))
    assert re.match("--seq-length 513 .* window of 512 .* 8 of its 12 layers.* --seq-length 512 or less", problem)
    assert check_lengths(DataConfig(seq_length=512, **trains), windowed) == []
    assert len(check_lengths(DataConfig(**trains), windowed)) == 1
    assert len(check_lengths(DataConfig(seq_length=513), windowed)) == 1
    assert check_lengths(DataConfig(), windowed) == []
    assert (windowed.longest_sequence, LLAMA.longest_sequence) == (512, 2048)
