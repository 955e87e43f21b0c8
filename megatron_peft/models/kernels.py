"""Which fused kernels a run uses, and how its pipeline stages exchange messages: fields of TransformerConfig.

What a flag decides is a function of the flag and of what is installed, so that it can be tried without a GPU.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from inspect import signature
from typing import Any

import torch

from megatron_peft.config import ModelConfig, ParallelConfig, RunConfig, require
from megatron_peft.models.shape import ModelShape


@dataclass(frozen=True)
class Installed:
    """What a fused kernel needs.

    Args:
        cuda: a GPU.
        transformer_engine: the package, which has the fused rotary embedding.
        accumulating_gemm: Apex's extension that adds a weight's gradient to its buffer within the product.
        varlen_attention: torch's attention over packed samples (`causal_varlen_attention`).
    """

    cuda: bool
    transformer_engine: bool = False
    accumulating_gemm: bool = False
    varlen_attention: bool = False

    @classmethod
    def detected(cls) -> "Installed":
        """On this machine; without a GPU nothing else matters, and nothing is imported."""
        if not torch.cuda.is_available():
            return cls(cuda=False)
        return cls(
            cuda=True,
            transformer_engine=can_import("transformer_engine"),
            accumulating_gemm=can_import("fused_weight_gradient_mlp_cuda"),
            varlen_attention=causal_varlen_attention() is not None,
        )


@dataclass(frozen=True)
class Training:
    """What the kernels must know of a run that trains.

    Args:
        trains_weights: full fine-tuning.
        recomputes_activation: an adapter's backward reads the input of linear_fc2, which our SwiGLU computes again.
        fixed_lengths: every microbatch has --seq-length positions (--pad-to-seq-length).
    """

    trains_weights: bool = False
    recomputes_activation: bool = True
    fixed_lengths: bool = False

    @classmethod
    def of(cls, config: RunConfig) -> "Training":
        """Of a run."""
        reads_input = {"lora_rank", "rotation_side"} & config.peft.spec.fields(config.peft)
        only_output = reads_input == {"rotation_side"} and config.peft.rotation_side == "output"
        return cls(
            trains_weights=not config.peft.trains_adapters,
            recomputes_activation=config.peft.trains_adapters and not only_output,
            fixed_lengths=config.data.pad_to_seq_length,
        )


ONLY_ANSWERS = Training()


def fusions(
    shape: ModelShape, settings: Mapping[str, Any], training: Training, installed: Installed
) -> dict[str, bool]:
    """Fields of TransformerConfig that fuse something: on where the kernel exists, unless a flag says no.

    Args:
        settings: `ModelConfig.transformer`, where a --no-*-fusion has left its field at False.
    """
    is_swiglu = shape.gated_linear_unit and shape.activation == "silu"
    adds_something = settings.get("hidden_dropout", 0) > 0 or bool({"linear_proj", "linear_fc2"} & shape.linear_biases)
    exists = {
        "bias_activation_fusion": is_swiglu and not training.recomputes_activation,
        "bias_dropout_fusion": adds_something,
        "apply_rope_fusion": shape.position_embedding == "rope" and installed.transformer_engine,
        "cross_entropy_loss_fusion": True,
        "gradient_accumulation_fusion": training.trains_weights and installed.accumulating_gemm,
    }
    return {name: installed.cuda and there and settings.get(name, True) for name, there in exists.items()}


def messages(settings: Mapping[str, Any], parallel: ParallelConfig, training: Training) -> dict[str, bool]:
    """Fields of TransformerConfig for the messages between pipeline stages.

    Of variable lengths, a stage tells the next one each message's shape, and both wait for the device to read it. The
    interleaved schedule does so always: without that exchange its losses were wrong with two stages.
    """
    # With two stages, the next one is also the previous one, and batched messages would be confused.
    overlaps = parallel.is_interleaved and settings.get("overlap_p2p_comm", True)
    fixed = training.fixed_lengths and not parallel.is_interleaved
    return {
        "overlap_p2p_comm": overlaps,
        "batch_p2p_comm": not overlaps,
        "variable_seq_lengths": not fixed,
        "batch_p2p_sync": not fixed,
        "deallocate_pipeline_outputs": fixed,
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
    if uses_transformer_engine:
        return
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


def require_cross_entropy(model: ModelConfig, installed: Installed) -> None:
    """Raises ConfigurationError if --cross-entropy-fusion-impl names a kernel that is not installed."""
    require(
        not installed.cuda
        or installed.transformer_engine
        or model.transformer.get("cross_entropy_fusion_impl") != "te",
        "--cross-entropy-fusion-impl te needs the package transformer_engine, which cannot be imported: use native.",
    )


def require_norm_recompute(model: ModelConfig, installed: Installed) -> None:
    """Raises ConfigurationError if --recompute-modules names norms, which megatron-core then cannot recompute."""
    require(
        not installed.cuda or installed.transformer_engine or "layernorm" not in model.recompute_modules,
        "--recompute-modules layernorm needs the package transformer_engine, which megatron-core calls there and which "
        "cannot be imported: leave layernorm out, or pip install 'transformer-engine[pytorch]'.",
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
