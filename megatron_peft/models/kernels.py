"""Which fused kernels a run uses, and how its pipeline stages exchange messages: fields of TransformerConfig.

What a flag decides is a function of the flag and of what is installed, so that it can be tried without a GPU.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from inspect import signature
from shutil import which
from typing import Any

import torch
from megatron.core.tensor_parallel import random

from megatron_peft.config import ModelConfig, ParallelConfig, RunConfig, require
from megatron_peft.models.shape import ModelShape

CUDNN_THAT_PACKS = 90600


@dataclass(frozen=True)
class Installed:
    """What a fused kernel needs."""

    cuda: bool  # a GPU
    transformer_engine: bool = False  # the package, which has the fused rotary embedding
    accumulating_gemm: bool = False  # Apex's extension that adds a weight's gradient to its buffer within the product
    varlen_attention: bool = False  # torch's attention over packed samples (`causal_varlen_attention`)
    flash_attn: bool = False  # the package, in a version that Transformer Engine takes
    compute_capability: tuple[int, int] = (0, 0)  # of the GPU: (8, 0) is an A100's, (9, 0) an H100's
    cudnn: int = 0  # its version as torch gives it, 91002 for 9.10.2
    compile_problem: str = ""  # why Triton, and with it torch.compile, makes no kernels here

    @classmethod
    def detected(cls) -> "Installed":
        """What this machine has; without a GPU nothing else matters, and nothing is imported."""
        if not torch.cuda.is_available():
            return cls(cuda=False)
        return cls(
            cuda=True,
            transformer_engine=can_import("transformer_engine"),
            accumulating_gemm=can_import("fused_weight_gradient_mlp_cuda"),
            varlen_attention=causal_varlen_attention() is not None,
            flash_attn=_engine_takes_flash_attn(),
            compute_capability=torch.cuda.get_device_capability(),
            cudnn=torch.backends.cudnn.version() or 0,
            compile_problem=_compile_problem(),
        )


@dataclass(frozen=True)
class Training:
    """What the kernels must know of a run that trains."""

    trains_weights: bool = False  # full fine-tuning
    recomputes_activation: bool = True  # an adapter reads the input of linear_fc2, which our SwiGLU computes again
    fixed_lengths: bool = False  # every microbatch has --seq-length positions (--pad-to-seq-length)

    @classmethod
    def of(cls, config: RunConfig) -> "Training":
        """The settings of a run."""
        reads_input = {"lora_rank", "rotation_side"} & config.peft.spec.fields(config.peft)
        only_output = reads_input == {"rotation_side"} and config.peft.rotation_side == "output"
        return cls(
            trains_weights=not config.peft.trains_adapters,
            recomputes_activation=config.peft.trains_adapters and not only_output,
            fixed_lengths=config.data.pad_to_seq_length,
        )


ONLY_ANSWERS = Training()
COMPILED = ("bias_activation_fusion", "bias_dropout_fusion", "cross_entropy_loss_fusion")  # all by Triton


def fusions(
    shape: ModelShape, bf16: bool, settings: Mapping[str, Any], training: Training, installed: Installed
) -> dict[str, bool]:
    """Fields of TransformerConfig that fuse something: on where the kernel exists and rounds no more than the run does,
    unless a flag says no: `settings` is `ModelConfig.transformer`, where a --no-*-fusion has left its field at False.

    In float32 two round: megatron-core's loss ends with a gradient in bf16, and Apex's product lets cuBLAS take its
    factors in half precision (CUBLAS_GEMM_DEFAULT_TENSOR_OP). The other kernels compute in float32 and keep it.
    """
    is_swiglu = shape.gated_linear_unit and shape.activation == "silu"
    adds_something = settings.get("hidden_dropout", 0) > 0 or bool({"linear_proj", "linear_fc2"} & shape.linear_biases)
    exists = {
        "bias_activation_fusion": is_swiglu and not training.recomputes_activation,
        "bias_dropout_fusion": adds_something,
        "apply_rope_fusion": shape.position_embedding == "rope" and installed.transformer_engine,
        "cross_entropy_loss_fusion": bf16 or settings.get("cross_entropy_fusion_impl") == "te",
        "gradient_accumulation_fusion": bf16 and training.trains_weights and installed.accumulating_gemm,
    }
    if installed.compile_problem:
        exists |= dict.fromkeys(COMPILED, False)
    return {name: installed.cuda and there and settings.get(name, True) for name, there in exists.items()}


def fusions_on_a_gpu(config: RunConfig, shape: ModelShape) -> dict[str, bool]:
    """`fusions` of a run where all packages of the container (Dockerfile) are installed."""
    everything = Installed(cuda=True, transformer_engine=True, accumulating_gemm=True)
    return fusions(shape, config.model.bf16, config.model.transformer, Training.of(config), everything)


def messages(settings: Mapping[str, Any], parallel: ParallelConfig, training: Training) -> dict[str, bool]:
    """Fields of TransformerConfig for the messages between pipeline stages.

    Of variable lengths, a stage tells the next one each message's shape, and both wait for the device to read it.
    """
    # With two stages, the next one is also the previous one, and batched messages would be confused.
    overlaps = parallel.is_interleaved and settings.get("overlap_p2p_comm", True)
    fixed = training.fixed_lengths
    return {
        "overlap_p2p_comm": overlaps,
        "batch_p2p_comm": not overlaps,
        "variable_seq_lengths": not fixed,
        "batch_p2p_sync": not fixed,
        # With overlap megatron-core 0.16 frees an output while it is being sent (Megatron-LM 4047): losses are wrong.
        "deallocate_pipeline_outputs": fixed and not overlaps,
    }


def require_packed_attention(
    config: RunConfig, shape: ModelShape, uses_transformer_engine: bool, installed: Installed
) -> None:
    """Raises ConfigurationError if packed samples could only be attended to one by one on a GPU."""
    if not (installed.cuda and config.data.pack_sequences):
        return
    require(
        shape.position_embedding != "alibi",
        "--pack-sequences on a GPU needs an attention kernel that takes packed samples with ALiBi, and there is none: "
        "leave it out.",
    )
    if not uses_transformer_engine:
        needs = "--pack-sequences on a GPU without Transformer Engine"
        way_out = "leave it out, or pip install 'transformer-engine[pytorch]'"
        require(
            installed.varlen_attention,
            f"{needs} takes torch.nn.attention.varlen of torch 2.13 or newer, which torch {torch.__version__} lacks: "
            f"{way_out}.",
        )
        require(config.model.bf16, f"{needs} uses a kernel for --bf16 only: give it, or {way_out}.")
        dropout = config.model.transformer.get("attention_dropout", 0)
        require(dropout == 0, f"{needs} has no --attention-dropout, which is {dropout}: use 0, or {way_out}.")
        return
    # It would attend to packed samples by all pairs of tokens, or not at all (before its release 2.11).
    needs = "--pack-sequences with Transformer Engine"
    require(config.model.bf16, f"{needs} uses kernels for --bf16 only: give it, or leave packing out.")
    wanted = config.model.attention_backend
    require(
        wanted in ("auto", "flash", "fused"),
        f"{needs} and --attention-backend {wanted} would compute the scores of all pairs of tokens: use auto.",
    )
    capability = ".".join(map(str, installed.compute_capability))
    require(
        engine_kernel(config, installed) != UNFUSED,
        f"{needs} and --attention-backend {wanted} finds no kernel here: flash-attn is "
        f"{'installed' if installed.flash_attn else 'not installed in a version that it takes'}, and cuDNN's needs "
        f"compute capability 9.0 and cuDNN 9.6, where this GPU has {capability} and cuDNN is "
        f"{_cudnn_name(installed.cudnn)}. It would compute the scores of all pairs of tokens: use --attention-backend "
        f"auto and pip install flash-attn (docs/install.md), or --transformer-impl local, or leave packing out.",
    )


FUSED, FLASH, UNFUSED = "cuDNN's kernel", "flash-attn", "unfused, the scores of all pairs of tokens"


def engine_kernel(config: RunConfig, installed: Installed) -> str:
    """Which kernel Transformer Engine (2.4 to 2.20) chooses for core attention: FUSED, FLASH or UNFUSED.

    Its own rules, for a causal mask without bias. cuDNN takes packed samples from compute capability 9.0 on, and with
    it version 9.6 where query heads share a key head; there it is preferred to flash-attn, before 9.0 flash-attn is.
    """
    wanted = config.model.attention_backend
    if not config.model.bf16 or installed.compute_capability < (8, 0):
        return UNFUSED
    is_hopper = installed.compute_capability >= (9, 0)
    fused = wanted in ("auto", "fused")
    if config.data.pack_sequences:
        fused = fused and is_hopper and installed.cudnn >= CUDNN_THAT_PACKS
    flash = wanted in ("auto", "flash") and installed.flash_attn
    if fused and (is_hopper or not flash):
        return FUSED
    return FLASH if flash else UNFUSED


def attention_summary(config: RunConfig, shape: ModelShape, uses_transformer_engine: bool, installed: Installed) -> str:
    """Which core attention a run has, in a line for its start."""
    chosen = f"--attention-backend {config.model.attention_backend}"
    if shape.position_embedding == "alibi":
        return f"core attention: torch's scaled_dot_product_attention with ALiBi's bias ({chosen})"
    if uses_transformer_engine:
        gpu = f"compute capability {'.'.join(map(str, installed.compute_capability))}"
        cudnn = f"cuDNN {_cudnn_name(installed.cudnn)}"
        return f"core attention: Transformer Engine's, {engine_kernel(config, installed)} ({chosen}, {gpu}, {cudnn})"
    if installed.cuda and config.data.pack_sequences:
        return "core attention: torch's kernel for packed samples (torch.nn.attention.varlen)"
    return f"core attention: torch's scaled_dot_product_attention ({chosen})"


def _cudnn_name(version: int) -> str:
    """91002 -> 9.10.2."""
    return f"{version // 10000}.{version // 100 % 100}.{version % 100}" if version else "not there"


def _engine_takes_flash_attn() -> bool:
    """Whether Transformer Engine found flash-attn in a version that it supports: it knows its own limits."""
    try:
        import_module("transformer_engine.pytorch")
        utils: Any = import_module("transformer_engine.pytorch.attention.dot_product_attention.utils")
    except ImportError:
        return False
    return bool(utils.FlashAttentionUtils.is_installed)


def require_cross_entropy(model: ModelConfig, installed: Installed) -> None:
    """Raises ConfigurationError if a flag asks for a fused loss that is not there, or that would round gradients."""
    engines = model.transformer.get("cross_entropy_fusion_impl") == "te"
    flag = "--cross-entropy-fusion-impl te" if engines else "--cross-entropy-loss-fusion"
    if not installed.cuda or not (engines or model.transformer.get("cross_entropy_loss_fusion")):
        return
    require(
        installed.transformer_engine or not engines,
        f"{flag} needs the package transformer_engine, which cannot be imported: use native.",
    )
    require(
        model.bf16 or engines,
        f"{flag} without --bf16 would round the gradients of a float32 run to bf16: leave it out, or give --bf16.",
    )
    require(
        not installed.compile_problem,
        f"{flag} needs Triton, which cannot compile here ({installed.compile_problem}): install a C compiler and "
        f"Python's headers (docs/install.md), or leave it out.",
    )


def without_compiled(config: RunConfig, shape: ModelShape, problem: str) -> tuple[RunConfig, str]:
    """The configuration for a world in which some node has this `compile_problem`, and what its start says of it.

    No rank fuses what is compiled: the fused loss makes other calls than the unfused one.
    """
    is_on = fusions_on_a_gpu(config, shape)
    if not problem or not any(is_on[name] for name in COMPILED):
        return config, ""
    transformer = {**config.model.transformer, **dict.fromkeys(COMPILED, False)}
    return replace(config, model=replace(config.model, transformer=transformer)), (
        f"WARNING: Triton cannot compile ({problem}): SwiGLU, dropout and the loss are not fused, which takes more "
        f"time and memory. Install a C compiler and Python's headers (docs/install.md)."
    )


@cache
def _compile_problem() -> str:
    """Have Triton load its driver, which it compiles in C at the first use on a node."""
    try:
        import_module("triton.runtime").driver.active.get_current_device()
    except Exception as error:  # no package, no compiler (RuntimeError), no Python.h (CalledProcessError)
        return f"{os.uname().nodename}: {type(error).__name__}: {(str(error).splitlines() or [''])[-1][:200]}"
    return ""


def require_norm_recompute(model: ModelConfig, installed: Installed) -> None:
    """Raises ConfigurationError if --recompute-modules names norms, which megatron-core then cannot recompute."""
    if "layernorm" not in model.recompute_modules:
        return
    require(
        not installed.cuda or installed.transformer_engine,
        "--recompute-modules layernorm needs the package transformer_engine, which megatron-core calls there and which "
        "cannot be imported: leave layernorm out, or pip install 'transformer-engine[pytorch]'.",
    )
    if hasattr(random, "_get_share_storage"):  # of megatron-core 0.19, which has torch compile it in the first backward
        from torch.utils import cpp_extension  # it imports setuptools, which need not be installed

        compiler = cpp_extension.get_cxx_compiler()
        require(
            cpp_extension.is_ninja_available() and which(compiler.partition(" ")[0]) is not None,
            f"--recompute-modules layernorm needs ninja and a C++ compiler ({compiler}), with which megatron-core "
            "compiles there: apt-get install ninja-build g++ python3-dev, or leave layernorm out.",
        )


@cache
def causal_varlen_attention() -> Callable[..., Any] | None:
    """torch's causal attention over packed samples, where a query head may share a key head; None if there is none."""
    try:
        attend = import_module("torch.nn.attention.varlen").varlen_attn
    except (ImportError, AttributeError):
        return None
    if not {"window_size", "scale", "enable_gqa"} <= signature(attend).parameters.keys():
        return None  # an earlier form of it
    return lambda *args, **kwargs: attend(*args, **kwargs, window_size=(-1, 0), enable_gqa=True)


def can_import(package: str) -> bool:
    """Whether the package is installed and loads."""
    try:
        import_module(package)
    except ImportError:
        return False
    return True
