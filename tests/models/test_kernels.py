"""What a fusion switch decides, by what is installed: tried without a GPU. Packed attention on one takes one kernel."""

import sys
from collections import ChainMap
from contextlib import nullcontext
from dataclasses import replace
from inspect import signature
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_peft.config import ConfigurationError, ModelConfig, ParallelConfig, RunConfig, make_run
from megatron_peft.models import kernels
from megatron_peft.models.gpt import transformer_config, uses_transformer_engine
from megatron_peft.models.kernels import FLASH, FUSED, UNFUSED, Installed, Training
from megatron_peft.models.shape import ModelShape
from tests.tiny_gpt import SIZES

LLAMA = ModelShape(**SIZES)
BLOOM = ModelShape(**SIZES | {
    "architecture": "bloom", "gated_linear_unit": False, "activation": "gelu_tanh", "position_embedding": "alibi",
    "linear_biases": frozenset({"linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"}),
})  # fmt: skip
GPU = Installed(cuda=True)
EVERYTHING = Installed(cuda=True, transformer_engine=True, accumulating_gemm=True, varlen_attention=True)
NO_COMPILER = replace(EVERYTHING, compile_problem="node7: no C compiler")
FULL = Training(trains_weights=True, recomputes_activation=False)
SWIGLU, DROPOUT, ROPE = "bias_activation_fusion", "bias_dropout_fusion", "apply_rope_fusion"
LOSS, GEMM = "cross_entropy_loss_fusion", "gradient_accumulation_fusion"
WITH_DROPOUT = {"hidden_dropout": 0.1}


def fused(
    shape: ModelShape, settings: dict[str, Any], training: Training, installed: Installed, bf16: bool = True
) -> set[str]:
    return {name for name, is_on in kernels.fusions(shape, bf16, settings, training, installed).items() if is_on}


@pytest.mark.parametrize(
    ("shape", "settings", "training", "installed", "expected"),
    [
        (LLAMA, {}, FULL, EVERYTHING, {SWIGLU, ROPE, LOSS, GEMM}),
        (LLAMA, WITH_DROPOUT, FULL, EVERYTHING, {SWIGLU, DROPOUT, ROPE, LOSS, GEMM}),
        (LLAMA, {}, Training(), EVERYTHING, {ROPE, LOSS}),  # our SwiGLU can be computed again, and no weight is trained
        (LLAMA, {}, FULL, GPU, {SWIGLU, LOSS}),
        (BLOOM, {}, FULL, EVERYTHING, {DROPOUT, LOSS, GEMM}),  # no SwiGLU, no rope; biases to add
        (LLAMA, {LOSS: True, **WITH_DROPOUT}, FULL, replace(EVERYTHING, cuda=False), set()),
    ],
)
def test_fusions_are_on_where_their_kernels_exist(shape, settings, training, installed, expected):
    assert fused(shape, settings, training, installed) == expected


def test_in_float32_nothing_is_fused_that_rounds_to_fewer_bits():
    """megatron-core's loss gives its gradient in bf16, and cuBLAS may take the factors of Apex's product in float16."""
    assert fused(LLAMA, WITH_DROPOUT, FULL, EVERYTHING, bf16=False) == {SWIGLU, DROPOUT, ROPE}
    engines = {"cross_entropy_fusion_impl": "te"}  # Transformer Engine's keeps float32
    assert fused(LLAMA, engines, FULL, EVERYTHING, bf16=False) == {SWIGLU, ROPE, LOSS}


def test_without_a_compiler_nothing_is_fused_that_is_compiled():
    assert fused(LLAMA, WITH_DROPOUT, FULL, NO_COMPILER) == {ROPE, GEMM}
    run, warning = kernels.without_compiled(run_of(), LLAMA, NO_COMPILER.compile_problem)
    assert not fused(LLAMA, dict(run.model.transformer), FULL, EVERYTHING) & {SWIGLU, DROPOUT, LOSS}
    assert "node7: no C compiler" in warning and "docs/install.md" in warning


def test_a_missing_compiler_is_no_news_where_nothing_is_compiled():
    for run, problem in ((run_of({"bf16": False}), NO_COMPILER.compile_problem), (run_of(), "")):
        assert kernels.without_compiled(run, LLAMA, problem) == (run, "")


def test_a_switch_turns_off_its_fusion_alone():
    everything = {SWIGLU, DROPOUT, ROPE, LOSS, GEMM}
    for name in everything:
        assert fused(LLAMA, {**WITH_DROPOUT, name: False}, FULL, EVERYTHING) == everything - {name}


@pytest.mark.parametrize(("training", "ours"), [(FULL, False), (Training(), True)])
def test_the_model_has_the_swiglu_that_was_chosen(training, ours):
    """megatron-core refuses its fused SwiGLU beside an activation module, which is what ours is."""
    config = transformer_config(LLAMA, True, {}, ParallelConfig(), training, GPU)
    assert (config.use_te_activation_func, config.bias_activation_fusion) == (ours, not ours)


def run_of(*settings: dict[str, Any]) -> RunConfig:
    values = {"pretrained_checkpoint": "m", "bf16": True, "mock_data": True, "train_iters": 1}
    return make_run(**dict(ChainMap(*settings, values)))


@pytest.mark.parametrize(
    ("peft", "expected"),
    [
        ({"method": "full"}, FULL),
        ({"method": "lora"}, Training()),
        ({"method": "hybrid"}, Training()),
        ({"method": "boft"}, Training(recomputes_activation=False)),
        ({"method": "urnn"}, Training(recomputes_activation=False)),
        ({"method": "boft", "rotation_side": "input"}, Training()),
    ],
)
def test_which_backward_reads_the_activation_depends_on_the_method(peft, expected):
    assert Training.of(run_of(peft)) == expected
    assert Training.of(run_of(peft, {"pad_to_seq_length": True})).fixed_lengths


def sent(settings: dict[str, Any], stages: ParallelConfig, **training: bool) -> set[str]:
    return {name for name, is_on in kernels.messages(settings, stages, Training(**training)).items() if is_on}


def test_messages_of_a_known_size_are_not_announced_or_waited_for():
    """And an output is not freed while it is being sent."""
    two = ParallelConfig(pipeline_model_parallel_size=2, world_size=2)
    batched = {"batch_p2p_comm", "deallocate_pipeline_outputs"}
    assert sent({}, two, fixed_lengths=True) == batched
    assert sent({}, two) == {"batch_p2p_comm", "variable_seq_lengths", "batch_p2p_sync"}
    three = ParallelConfig(pipeline_model_parallel_size=3, num_layers_per_virtual_pipeline_stage=1, world_size=3)
    for settings in ({}, {"overlap_p2p_comm": True}):
        assert sent(settings, three, fixed_lengths=True) == {"overlap_p2p_comm"}
    assert sent({"overlap_p2p_comm": False}, three, fixed_lengths=True) == batched


PACKED: dict[str, Any] = {"pack_sequences": True}


@pytest.mark.parametrize(
    ("shape", "model", "installed", "message"),
    [
        (BLOOM, {}, EVERYTHING, "packed samples with ALiBi"),
        (LLAMA, {}, GPU, "torch.nn.attention.varlen of torch 2.13"),
        (LLAMA, {"bf16": False}, Installed(True, varlen_attention=True), "for --bf16 only"),
        (LLAMA, {"transformer": {"attention_dropout": 0.1}}, Installed(True, varlen_attention=True), "-dropout, which"),
    ],
)
def test_packing_on_a_gpu_is_refused_where_no_kernel_takes_it(shape, model, installed, message):
    with pytest.raises(ConfigurationError, match=message):
        kernels.require_packed_attention(run_of(PACKED, model), shape, False, installed)
    kernels.require_packed_attention(run_of(PACKED, model), shape, False, Installed(cuda=False))
    kernels.require_packed_attention(run_of(model), shape, False, installed)
    kernels.require_packed_attention(run_of(PACKED), LLAMA, False, EVERYTHING)


A100 = Installed(cuda=True, transformer_engine=True, compute_capability=(8, 0), cudnn=92000)
H100 = replace(A100, compute_capability=(9, 0))


@pytest.mark.parametrize(
    ("installed", "backend", "padded", "packed"),
    [
        (H100, "auto", FUSED, FUSED),
        (replace(H100, flash_attn=True), "auto", FUSED, FUSED),  # Transformer Engine prefers cuDNN's from Hopper on
        (replace(H100, flash_attn=True), "flash", FLASH, FLASH),
        (replace(H100, cudnn=90600), "auto", FUSED, FUSED),
        (replace(H100, cudnn=90599), "auto", FUSED, UNFUSED),
        (replace(H100, cudnn=90501, flash_attn=True), "auto", FUSED, FLASH),
        (H100, "flash", UNFUSED, UNFUSED),
        (H100, "unfused", UNFUSED, UNFUSED),
        (A100, "auto", FUSED, UNFUSED),
        (replace(A100, flash_attn=True), "auto", FLASH, FLASH),
        (replace(A100, flash_attn=True), "fused", FUSED, UNFUSED),
        (replace(A100, flash_attn=True, compute_capability=(7, 5)), "auto", UNFUSED, UNFUSED),
    ],
)
def test_packed_samples_are_refused_where_transformer_engine_takes_all_pairs(installed, backend, padded, packed):
    alone, run = run_of({"attention_backend": backend}), run_of(PACKED, {"attention_backend": backend})
    assert [kernels.engine_kernel(one, installed) for one in (alone, run)] == [padded, packed]
    kernels.require_packed_attention(alone, LLAMA, True, installed)
    told = pytest.raises(ConfigurationError, match="compute the scores of all pairs of tokens")
    with told if packed == UNFUSED else nullcontext():
        kernels.require_packed_attention(run, LLAMA, True, installed)


def test_the_refusal_of_packed_samples_names_what_is_there_and_the_ways_out():
    with pytest.raises(ConfigurationError) as refused:
        kernels.require_packed_attention(run_of(PACKED), LLAMA, True, A100)
    assert "this GPU has 8.0 and cuDNN is 9.20.0" in str(refused.value)
    assert "pip install flash-attn" in str(refused.value) and "--transformer-impl local" in str(refused.value)
    with pytest.raises(ConfigurationError, match="for --bf16 only"):
        kernels.require_packed_attention(run_of(PACKED, {"bf16": False}), LLAMA, True, H100)


@pytest.mark.parametrize(
    ("shape", "data", "with_engine", "installed", "line"),
    [
        (LLAMA, {}, True, H100, "cuDNN's kernel (--attention-backend auto, compute capability 9.0, cuDNN 9.20.0)"),
        (LLAMA, PACKED, True, replace(A100, flash_attn=True), "Transformer Engine's, flash-attn (--attention-backend"),
        (LLAMA, PACKED, False, EVERYTHING, "torch's kernel for packed samples"),
        (LLAMA, PACKED, False, Installed(cuda=False), "scaled_dot_product_attention (--attention-backend auto)"),
        (BLOOM, {}, True, H100, "scaled_dot_product_attention with ALiBi's bias"),
    ],
)
def test_the_start_of_a_run_names_its_core_attention(shape, data, with_engine, installed, line):
    assert line in kernels.attention_summary(run_of(data), shape, with_engine, installed)


def test_transformer_engine_itself_says_whether_it_takes_flash_attn(monkeypatch: pytest.MonkeyPatch):
    """The class stood there, with this field, in the 21 releases from 2.4.0 to 2.20.2."""
    utils = "transformer_engine.pytorch.attention.dot_product_attention.utils"
    assert not kernels._engine_takes_flash_attn()  # not installed
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", ModuleType("pytorch"))
    for known in (True, False):
        module = ModuleType("utils")
        module.FlashAttentionUtils = SimpleNamespace(is_installed=known)  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, utils, module)
        assert kernels._engine_takes_flash_attn() == known


@pytest.mark.parametrize(
    ("setting", "bf16", "installed", "message"),
    [
        ({"cross_entropy_fusion_impl": "te"}, False, GPU, "use native"),
        ({LOSS: True}, False, EVERYTHING, "without --bf16 would round the gradients"),
        ({LOSS: True}, True, NO_COMPILER, "Triton, which cannot compile here .node7: no C compiler"),
        ({"cross_entropy_fusion_impl": "te"}, False, NO_COMPILER, "fusion-impl te needs Triton, which cannot compile"),
    ],
)
def test_a_fused_loss_that_was_asked_for_is_there_and_keeps_the_precision(setting, bf16, installed, message):
    with pytest.raises(ConfigurationError, match=message):
        kernels.require_cross_entropy(ModelConfig("m", bf16=bf16, transformer=setting), installed)
    kernels.require_cross_entropy(ModelConfig("m", bf16=True, transformer=setting), EVERYTHING)
    kernels.require_cross_entropy(ModelConfig("m", bf16=bf16, transformer=setting), Installed(cuda=False))
    kernels.require_cross_entropy(ModelConfig("m", bf16=bf16), installed)


@pytest.mark.parametrize("error", [None, ModuleNotFoundError("No module named 'triton'"), RuntimeError("no compiler")])
def test_triton_itself_says_whether_it_compiles(monkeypatch: pytest.MonkeyPatch, error: Exception | None):
    """Its driver is made, in C, at the first question: so in release 3.9, without compiler and without Python.h."""
    active = SimpleNamespace(get_current_device=mock.Mock(side_effect=error))
    monkeypatch.setitem(sys.modules, "triton.runtime", SimpleNamespace(driver=SimpleNamespace(active=active)))
    monkeypatch.setitem(sys.modules, "triton", ModuleType("triton"))
    kernels._compile_problem.cache_clear()
    found = kernels._compile_problem()
    kernels._compile_problem.cache_clear()
    assert found.endswith(f"{type(error).__name__}: {error}") if error else found == ""


def test_auto_takes_transformer_engine_on_a_gpu():
    asked = (("auto", EVERYTHING), ("auto", GPU), ("auto", Installed(False, True)), ("local", EVERYTHING))
    assert [uses_transformer_engine(*one) for one in asked] == [True, False, False, False]


def test_norms_are_recomputed_on_a_gpu_with_transformer_engine_only(monkeypatch):
    monkeypatch.delattr(kernels.random, "_get_share_storage", raising=False)
    recomputed = {"transformer": {"recompute_granularity": "selective"}, "recompute_modules": ("mlp", "layernorm")}
    kernels.require_norm_recompute(run_of(recomputed).model, EVERYTHING)
    with pytest.raises(ConfigurationError, match="--recompute-modules layernorm needs the package transformer_engine"):
        kernels.require_norm_recompute(run_of(recomputed).model, GPU)


@pytest.mark.parametrize(("ninja", "compiler"), [(True, "/missing/c++"), (False, "sh"), (True, "sh -c")])
def test_norms_that_are_recomputed_by_compiled_code_need_what_compiles_it(monkeypatch, ninja, compiler):
    monkeypatch.setattr(kernels.random, "_get_share_storage", None, raising=False)
    monkeypatch.setattr("torch.utils.cpp_extension.is_ninja_available", lambda: ninja)
    monkeypatch.setenv("CXX", compiler)
    alone: Any = SimpleNamespace(recompute_modules=("mlp",))
    kernels.require_norm_recompute(alone, Installed(cuda=False))
    alone.recompute_modules = ("layernorm",)
    is_there = (ninja, compiler) == (True, "sh -c")
    with nullcontext() if is_there else pytest.raises(ConfigurationError, match="needs ninja and a C\\+\\+ compiler"):
        kernels.require_norm_recompute(alone, Installed(cuda=False))


def test_torchs_packed_attention_is_called_as_it_is_declared(monkeypatch: pytest.MonkeyPatch):
    """The kernel itself is for a GPU; its signature is not."""
    varlen = pytest.importorskip("torch.nn.attention.varlen", reason="this torch has none")
    kernels.causal_varlen_attention.cache_clear()
    if kernels.causal_varlen_attention() is None:
        pytest.skip("this torch has an earlier form of it")
    bound = []
    plain = signature(varlen.varlen_attn)

    def recorded(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa):
        bound.append(plain.bind(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale).arguments)
        bound[-1] |= {"window_size": window_size, "enable_gqa": enable_gqa}
        return query

    monkeypatch.setattr(varlen, "varlen_attn", recorded)
    kernels.causal_varlen_attention.cache_clear()
    attend, x, bounds = kernels.causal_varlen_attention(), torch.zeros(5, 2, 8), torch.tensor([0, 2, 5])
    assert attend is not None
    attend(x, x, x, bounds, bounds, 3, 3, scale=0.5)
    kernels.causal_varlen_attention.cache_clear()
    assert bound[0]["window_size"] == (-1, 0) and bound[0]["enable_gqa"] and bound[0]["max_q"] == 3
