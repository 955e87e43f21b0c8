"""A base model on megatron-core's GPTModel, from its shape.

megatron-core's layer spec lets us choose the linear layers (which take an adapter), the norms, SwiGLU and the core
attention. A hook adds a norm of the word embeddings.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnBackend, AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megatron_peft.adapters.linear import AdaptedColumnParallelLinear, AdaptedRowParallelLinear
from megatron_peft.adapters.quantized_weight import quantize, weights_as
from megatron_peft.config import ModelConfig, ParallelConfig, require
from megatron_peft.models.families import family_of
from megatron_peft.models.kernels import ONLY_ANSWERS, Installed, Training, can_import, fusions, messages
from megatron_peft.models.layers import (
    AlibiAttention,
    AlibiBias,
    CachingSelfAttention,
    LayerNorm,
    RMSNorm,
    ScaledDotProductAttention,
    SwiGLU,
)
from megatron_peft.models.loss import ChunkedLossModel, OutputLayer, chunk_tokens
from megatron_peft.models.shape import ModelShape, RopeScaling
from megatron_peft.parallel.layout import mark_split

_ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}
_NORMS = {"RMSNorm": RMSNorm, "LayerNorm": LayerNorm}


@dataclass
class GPTConfig(TransformerConfig):
    """TransformerConfig, with the linear layers that own a bias, Hugging Face's names (`Family.modules`),
    --attention-backend for our core attention, precisions of the linear layers and of the output layer, and
    --cross-entropy-chunk-tokens for the loss.
    """

    linear_biases: frozenset[str] = frozenset()
    huggingface_modules: Mapping[str, str] = field(default_factory=dict)
    attention_kernel: str = "auto"
    base_precision: str = "run"
    output_precision: str = "run"
    loss_chunk_tokens: int = 0


def transformer_config(
    shape: ModelShape,
    bf16: bool,
    settings: Mapping[str, Any],
    parallel: ParallelConfig,
    training: Training = ONLY_ANSWERS,
    installed: Installed | None = None,
) -> GPTConfig:
    """megatron-core's configuration of a model of this shape, at this layout; `installed` None: on this machine."""
    dtype = torch.bfloat16 if bf16 else torch.float32
    fused = fusions(shape, bf16, settings, training, installed or Installed.detected())
    run: dict[str, Any] = {"hidden_dropout": 0.0, "attention_dropout": 0.0, **settings, **fused}
    run |= messages(settings, parallel, training)
    is_swiglu = shape.gated_linear_unit and shape.activation == "silu"
    return GPTConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_query_groups,
        kv_channels=shape.kv_channels,
        normalization=shape.normalization,
        layernorm_epsilon=shape.norm_epsilon,
        activation_func=_ACTIVATIONS[shape.activation],
        gated_linear_unit=shape.gated_linear_unit,
        # Makes megatron-core build the spec's activation_func, which need not be Transformer Engine's.
        use_te_activation_func=is_swiglu and not fused["bias_activation_fusion"],
        add_bias_linear=False,
        linear_biases=shape.linear_biases,
        qk_layernorm=shape.qk_layernorm,  # also makes megatron-core sum the gradients of these norms over the ranks
        huggingface_modules=family_of(shape.architecture).modules,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.num_virtual_stages(shape.num_layers),
        num_layers_in_first_pipeline_stage=parallel.decoder_first_pipeline_num_layers,
        num_layers_in_last_pipeline_stage=parallel.decoder_last_pipeline_num_layers,
        account_for_embedding_in_pipeline_split=parallel.account_for_embedding_in_pipeline_split,
        account_for_loss_in_pipeline_split=parallel.account_for_loss_in_pipeline_split,
        pipeline_model_parallel_layout=parallel.pipeline_model_parallel_layout,
        sequence_parallel=parallel.sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=bf16,
        perform_initialization=False,  # every weight is loaded
        calculate_per_token_loss=True,
        moe_token_dispatcher_type="alltoall",  # unused, but megatron-core refuses its default with variable lengths
        **run,
    )


def build_model_chunks(
    shape: ModelShape, model: ModelConfig, parallel: ParallelConfig, training: Training = ONLY_ANSWERS
) -> list[ChunkedLossModel]:
    """This rank's part of the base model, one chunk for each virtual pipeline stage, weights not yet loaded."""
    settings = {**model.transformer, "recompute_modules": list(model.recompute_modules) or None}
    config = transformer_config(shape, model.bf16, settings, parallel, training)
    # Norm and core attention of all layers are ours, or Transformer Engine's if it is requested, or installed on a
    # machine with a GPU. Its linear layers are never used: they take no adapter and would change the checkpoint's keys.
    norm: Any = _NORMS[shape.normalization]
    core_attention: Any = ScaledDotProductAttention
    config.attention_kernel, config.base_precision = model.attention_backend, model.base_precision
    config.output_precision = model.base_precision if model.quantize_output_layer else "run"
    if uses_transformer_engine(model.transformer_impl, Installed.detected()):
        from megatron.core.extensions.transformer_engine import TEDotProductAttention, TENorm

        norm, core_attention = TENorm, TEDotProductAttention
        config.attention_backend = AttnBackend[model.attention_backend]  # GPTModel passes it on in the environment
    if shape.position_embedding == "alibi":
        size = parallel_state.get_tensor_model_parallel_world_size()
        bias = AlibiBias(shape.num_attention_heads, parallel_state.get_tensor_model_parallel_rank(), size)
        core_attention = ModuleSpec(module=AlibiAttention, params={"bias": bias})
    vocab_size = shape.padded_vocab_size(model.make_vocab_size_divisible_by, config.tensor_model_parallel_size)
    own_vocab_size = vocab_size // config.tensor_model_parallel_size
    config.loss_chunk_tokens = chunk_tokens(model.cross_entropy_chunk_tokens, own_vocab_size)
    num_chunks = config.virtual_pipeline_model_parallel_size
    return [
        _build_chunk(shape, vocab_size, config, norm, core_attention, stage if num_chunks else None)
        for stage in range(num_chunks or 1)
    ]


def _build_chunk(
    shape: ModelShape, vocab_size: int, config: GPTConfig, norm: Any, core_attention: Any, vp_stage: int | None
) -> ChunkedLossModel:
    with weights_as(config.output_precision):
        chunk = ChunkedLossModel(
            config=config,
            transformer_layer_spec=_block_spec(config, norm, core_attention, vp_stage),
            vocab_size=vocab_size,
            max_sequence_length=shape.max_position_embeddings,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
            parallel_output=True,
            share_embeddings_and_output_weights=shape.tied_embeddings,
            position_embedding_type="rope" if shape.position_embedding == "rope" else "none",
            rotary_base=shape.rotary_base,  # pyright: ignore[reportArgumentType]
            vp_stage=vp_stage,
        )
    if chunk.pre_process and config.output_precision != "run":  # the one matrix of its own
        embedding = chunk.embedding.word_embeddings
        weight = torch.empty_like(embedding.weight, device=torch.cuda.current_device())
        embedding.weight = torch.nn.Parameter(weight)
    if shape.rope_scaling is not None:
        _scale_rope(chunk, shape.rope_scaling)
    if shape.embedding_layernorm and chunk.pre_process:
        # A norm of the embedded tokens: before dropout and, under sequence parallelism, on the rank's own tokens. It is
        # not a child of word_embeddings, whose sharded state omits children.
        layernorm = norm(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)
        chunk.embedding.word_embeddings_layernorm = layernorm
        chunk.embedding.word_embeddings.register_forward_hook(lambda module, inputs, output: layernorm(output))
    # megatron-core leaves these unmarked with `perform_initialization=False`: norms would count rank 0's slice.
    for module in (getattr(chunk, "output_layer", None), getattr(chunk, "embedding", None)):
        weight = getattr(getattr(module, "word_embeddings", module), "weight", None)
        if weight is not None:
            mark_split(weight, 0)
    if chunk.post_process:
        chunk.output_layer.__class__ = OutputLayer  # a layer spec cannot choose it
        chunk.output_layer.vocab_size = shape.vocab_size
        quantize(chunk.output_layer, config.output_precision)
    return chunk


def _block_spec(config: GPTConfig, norm: Any, core_attention: Any, vp_stage: int | None) -> Any:
    """The same spec for every layer of the stage, and the final norm."""
    bias_dropout_add: Any = get_bias_dropout_add
    activation: Any = SwiGLU if config.use_te_activation_func else None
    head_norm: Any = norm if config.qk_layernorm else None
    layer = ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=ModuleSpec(
                module=CachingSelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=AdaptedColumnParallelLinear,
                    core_attention=core_attention,
                    linear_proj=AdaptedRowParallelLinear,
                    q_layernorm=head_norm,
                    k_layernorm=head_norm,
                ),
            ),
            self_attn_bda=bias_dropout_add,
            pre_mlp_layernorm=norm,
            mlp=ModuleSpec(
                module=MLP,
                submodules=MLPSubmodules(
                    linear_fc1=AdaptedColumnParallelLinear,
                    linear_fc2=AdaptedRowParallelLinear,
                    activation_func=activation,
                ),
            ),
            mlp_bda=bias_dropout_add,
            sharded_state_dict_keys_map={},
        ),
    )
    num_layers = get_num_layers_to_build(config, vp_stage=vp_stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=norm)


def uses_transformer_engine(transformer_impl: str, installed: Installed) -> bool:
    """Whether norms and core attention are Transformer Engine's, by --transformer-impl."""
    here = installed.cuda and installed.transformer_engine
    return transformer_impl == "transformer_engine" or (transformer_impl == "auto" and here)


def require_transformer_engine(model: ModelConfig) -> None:
    """Raises ConfigurationError if --transformer-impl asks for it and it cannot be used here."""
    if model.transformer_impl == "transformer_engine":
        named = "--transformer-impl transformer_engine needs"
        require(torch.cuda.is_available(), f"{named} a GPU, and there is none here: use auto or local.")
        require(
            can_import("transformer_engine"),
            f"{named} the package transformer_engine, which cannot be imported: use auto or local, or "
            f"pip install 'transformer-engine[pytorch]'.",
        )


def _scale_rope(chunk: ChunkedLossModel, scaling: RopeScaling) -> None:
    """Llama 3's frequencies: those of long wavelengths are divided by `factor`, those of short ones are kept, and a
    linear blend lies between. megatron-core's own `rope_scaling` sets the factor only.
    """
    rope = chunk.rotary_pos_emb
    wavelength = 2 * torch.pi / rope.inv_freq
    turns = scaling.original_max_position_embeddings / wavelength
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = kept.clamp(0, 1)
    rope.inv_freq = rope.inv_freq * (kept + (1 - kept) / scaling.factor)
