"""What fields do not say of their flags, as data: groups of --help, spelled-out names, which method owns what.

`megatron_peft.cli.flags` makes flags of these tables and of the dataclasses.
"""

from collections.abc import Mapping
from typing import Any

from megatron_peft.config import PEFT_METHODS

# Titles of --help, in order; what no other table places goes to the group of its section.
GROUPS = (
    "model",
    "network size (optional: compared with the checkpoint)",
    "PEFT",
    "data",
    "tokenizer",
    "training",
    "validation",
    "learning rate",
    "optimizer and regularization",
    "activation recompute and fusions",
    "mixed precision",
    "checkpointing",
    "distributed",
    "logging",
    "accepted, since they hold here anyway",
)
SHAPE, RECOMPUTE, ACCEPTED_GROUP = GROUPS[1], GROUPS[9], GROUPS[14]
SECTION_GROUPS = {
    "parallel": "distributed",
    "peft": "PEFT",
    "optimizer": "optimizer and regularization",
    "checkpoint": "checkpointing",
}
FIELD_GROUPS = {
    "bf16": "mixed precision",
    "eval_interval": "validation",
    "eval_iters": "validation",
    "overlap_grad_reduce": "distributed",
    "overlap_param_gather": "distributed",
    "override_opt_param_scheduler": "learning rate",
    "use_checkpoint_opt_param_scheduler": "learning rate",
    "use_distributed_optimizer": "distributed",
    "vocab_size": "tokenizer",
}
PREFIX_GROUPS = {"tokenizer_": "tokenizer", "lr": "learning rate", "min_lr": "learning rate"}

FLAG_NAMES = {  # where a flag is not simply its field's name
    "method": ("--peft-method",),
    "target_modules": ("--peft-target-modules",),
    "override_opt_param_scheduler": ("--override-opt-param-scheduler", "--override-opt_param-scheduler"),
    "use_checkpoint_opt_param_scheduler": (
        "--use-checkpoint-opt-param-scheduler",
        "--use-checkpoint-opt_param-scheduler",
    ),
}
NO_FLAG = frozenset({"world_size", "shape_flags", "transformer"})  # from the environment, or gathered from others
PATH_FIELDS = frozenset(
    "pretrained_checkpoint train_data_path valid_data_path test_data_path data_path data_cache_path tokenizer_model "
    "save load tensorboard_dir wandb_save_dir".split()
)

# PeftConfig field or its prefix (the longest wins) -> methods that it belongs to; with others it is an error.
METHODS_OF = {
    "lora_": ("lora", "lora-ga", "hybrid"),
    "lora_ga_": ("lora-ga", "hybrid"),
    "boft_": ("boft", "hybrid"),
    "urnn_": ("urnn", "hybrid"),
    "urnn_mode": ("urnn",),
    "rotation_": ("boft", "urnn", "hybrid"),
    "peft_lr_rotation": ("boft", "urnn", "hybrid"),
    "hybrid_": ("hybrid",),
    "target_modules": tuple(method for method in PEFT_METHODS if method != "full"),
}

SHAPE_FIELDS = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "normalization",
)
RUN_FIELDS = (
    "attention_dropout",
    "hidden_dropout",
    "recompute_granularity",
    "recompute_method",
    "recompute_num_layers",
    "distribute_saved_activations",
)
RUN_DEFAULTS = {"attention_dropout": 0.0, "hidden_dropout": 0.0}  # a pretrained model is tuned without dropout

# Spelled-out names of Megatron-LM that say something about the shape: -> (type or constant, help).
SHAPE_VALUES: Mapping[str, tuple[type | tuple[str, ...], str]] = {
    "norm_epsilon": (float, "epsilon of the norms"),
    "max_position_embeddings": (int, "longest sequence that the model was made for, in tokens"),
    "position_embedding_type": (("rope", "alibi"), "kind of position embedding"),
    "rotary_base": (float, "base of the rotary embedding"),
    "rotary_percent": (float, "part of a head that is rotated; Llama rotates all of it: 1"),
    "rope_scaling_factor": (float, "factor of Llama 3's rope scaling"),
}
SHAPE_CLAIMS = {
    "group_query_attention": "heads share keys and values",
    "use_rotary_position_embeddings": "the position embedding is rotary",
    "use_rope_scaling": "the rotary embedding is scaled as in Llama 3",
    "swiglu": "the MLP is gated, with SiLU",
    "openai_gelu": "the activation is GELU in its tanh form",
    "disable_bias_linear": "linear layers have no bias (but see --add-qkv-bias)",
    "add_qkv_bias": "linear_qkv has a bias",
    "untie_embeddings_and_output_weights": "the output layer has a weight of its own",
}
# Spelled-out names that set a field of TransformerConfig: -> (field, value, help).
RUN_SWITCHES: Mapping[str, tuple[str, Any, str]] = {
    "--recompute-activations": ("recompute_granularity", "selective", "same as --recompute-granularity selective"),
    "--no-bias-gelu-fusion": ("bias_activation_fusion", False, "do not fuse bias and GELU"),
    "--no-bias-swiglu-fusion": ("bias_activation_fusion", False, "do not fuse bias and SwiGLU"),
    "--no-bias-dropout-fusion": ("bias_dropout_fusion", False, "do not fuse bias and dropout"),
    "--no-rope-fusion": ("apply_rope_fusion", False, "do not fuse the rotary embedding"),
    "--no-masked-softmax-fusion": ("masked_softmax_fusion", False, "do not fuse scale, mask and softmax"),
    "--no-gradient-accumulation-fusion": ("gradient_accumulation_fusion", False, "do not accumulate inside the GEMM"),
    "--no-persist-layer-norm": ("persist_layer_norm", False, "do not use the persistent layer norm kernel"),
    "--no-overlap-p2p-communication": ("overlap_p2p_comm", False, "do not overlap sends between pipeline stages"),
}
# Flags that ask for what is always so: -> why. They change nothing.
ACCEPTED = {
    "--use-mcore-models": "models are always built of megatron-core",
    "--use-dist-ckpt": "checkpoints are always distributed",
    "--calculate-per-token-loss": "the loss is always the mean over the tokens of the global batch",
    "--accumulate-allreduce-grads-in-fp32": "gradients are always reduced in float32",
    "--attention-softmax-in-fp32": "torch and Transformer Engine compute the softmax in float32",
    "--no-initialization": "weights are always read, never drawn",
    "--no-one-logger": "that service is never called",
}
ACCEPTED_VALUES = {"--ckpt-format": ("torch_dist",)}


def methods_of(field_name: str) -> tuple[str, ...]:
    """PEFT methods that a field of PeftConfig belongs to; empty for `method` itself."""
    stems = [stem for stem in METHODS_OF if field_name.startswith(stem)]
    return METHODS_OF[max(stems, key=len)] if stems else ()
