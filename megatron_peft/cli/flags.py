"""The flags that are served: a flag for each field of our dataclasses, for fields of megatron-core's, and Megatron-LM's
spelled-out names.

Nothing here parses. `served_flags()` is the whole list; `megatron_peft.cli.parser` turns it into a parser.
"""

from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, fields
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from megatron_peft.cli.megatron import SOURCES, MegatronField, megatron_fields
from megatron_peft.config import PEFT_METHODS, RunConfig, flag

# What fields do not say of their flags, as data: groups of --help, spelled-out names, which method owns what.

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


# The words of --help, by field: our own, and Megatron's where megatron-core's dataclasses have none for them.

HELP = {
    "pretrained_checkpoint": "base model: a Hugging Face folder (config.json and *.safetensors)",
    "transformer_impl": "where norms and core attention come from; auto: Transformer Engine where it is installed",
    "make_vocab_size_divisible_by": "the vocabulary is padded to a multiple of this, per tensor-parallel rank",
    "bf16": "train in bfloat16, with float32 master parameters",
    "method": "which parameters are trained",
    "target_modules": "layers that are adapted: linear_qkv linear_proj linear_fc1 linear_fc2, Hugging Face names "
    "(a fused layer is adapted whole), wildcards",
    "lora_rank": "r, the inner size of the low-rank factors",
    "lora_alpha": "the low-rank part is scaled by alpha / r",
    "lora_dropout": "dropout on the input of the low-rank part",
    "lora_rs": "scale by alpha / sqrt(r) instead (rsLoRA)",
    "lora_plus_ratio": "learning rate of B over that of A (LoRA+)",
    "lora_max_norm_ratio": "after each step, scale the low-rank change of a weight down to at most this part of the "
    "weight's own Frobenius norm",
    "lora_ga_batches": "global batches of the gradient that LoRA-GA starts from",
    "lora_ga_init": "LoRA-GA's start: aligned (A along the gradient, B zero), paper (eq. (8)) or original (as "
    "published); the last two subtract a frozen copy of it",
    "rotation_side": "which side of a weight turns: R W, or W R^T as in Hugging Face PEFT",
    "boft_block_size": "b, the size of the orthogonal blocks",
    "boft_factors": "m, butterfly factors: groups of b 2^(m-1) features turn together",
    "peft_lr_rotation": "learning rate of rotation parameters; default: --lr, in the Hybrid --lr / 8",
    "boft_parametrization": "cayley: blocks are Cayley transforms; projection: blocks themselves are trained, and "
    "each step ends at the nearest orthogonal ones",
    "urnn_block_size": "real features that turn together; two of them make a complex one",
    "urnn_update": "structured: phases and reflections are trained; riemannian: the unitary blocks, by the exponential "
    "map with the plain gradient (needs a rate of its own: --peft-lr-rotation)",
    "urnn_mode": "replace DISCARDS the pretrained weight of square layers and puts a unitary one in its place",
    "hybrid_rotation": "the rotation that is mixed in",
    "hybrid_lambda": "the mixture: gradient (norms of the gradients before mixing), rms (the same per parameter), "
    "descent (what a step of each part gains), raw (the paper's norms), or fixed:X",
    "hybrid_merge_interval": "fold the change into the weight after so many iterations and start the adapters again",
    "hybrid_lambda_init": "lambda before the first step, where it is not fixed",
    "hybrid_lambda_ema": "weight of lambda's last value in its moving average",
    "hybrid_lambda_min": "lambda falls no lower",
    "hybrid_lambda_max": "lambda rises no higher",
    "train_data_path": "training data: *.json/*.jsonl with prompt and completion, messages or text; or indexed "
    "prefixes, optionally each after its weight",
    "valid_data_path": "validation data, as --train-data-path",
    "test_data_path": "test data, as --train-data-path",
    "data_path": "indexed .bin/.idx prefixes, optionally each after its weight, cut by --split",
    "split": "shares of training, validation and test, such as 969,30,1",
    "data_cache_path": "folder of the index files that are built from indexed data",
    "seq_length": "longest sample, in tokens",
    "overlong": "what happens to a longer sample; truncate cuts the end of its completion, with a warning",
    "pack_sequences": "pack several samples into one sequence, without attention across them",
    "tokenizer_type": "kind of tokenizer",
    "tokenizer_model": "tokenizer folder or sentencepiece model (default: the folder of --pretrained-checkpoint)",
    "vocab_size": "size of NullTokenizer's vocabulary; with the others it is compared with the checkpoint",
    "num_workers": "processes that load data, per rank",
    "seed": "seed of parameters, dropout and the order of samples",
    "micro_batch_size": "samples a forward pass holds, on each data-parallel rank",
    "global_batch_size": "samples a step, over all ranks (default: --micro-batch-size x data-parallel ranks)",
    "train_iters": "length of the run in iterations",
    "train_samples": "length of the run in samples",
    "train_epochs": "length of the run in passes over the training data; may be a fraction",
    "eval_interval": "iterations between validations",
    "eval_iters": "global batches a validation takes (default: the whole validation set, once)",
    "check_for_nan_in_loss_and_grad": "stop at a loss or gradient that is not a number, naming iteration and rank",
    "exit_interval": "save and exit at a multiple of this many iterations",
    "exit_duration_in_mins": "save and exit after this many minutes",
    "exit_signal_handler": "save and exit at SIGINT (Ctrl-C), SIGTERM and SIGUSR1",
    "optimizer": "adam means AdamW",
    "lr": "highest learning rate, reached after the warmup",
    "min_lr": "learning rate at the end of the decay",
    "lr_decay_style": "how the learning rate decays",
    "lr_decay_iters": "iterations over which it decays (default: --train-iters)",
    "lr_decay_samples": "samples over which it decays (default: --train-samples)",
    "lr_warmup_iters": "iterations of linear warmup",
    "lr_warmup_samples": "samples of linear warmup",
    "lr_warmup_fraction": "warmup as a part of the decay",
    "lr_warmup_init": "learning rate at which the warmup starts",
    "lr_wsd_decay_iters": "iterations of WSD's last phase",
    "lr_wsd_decay_samples": "samples of WSD's last phase",
    "lr_wsd_decay_style": "how the rate falls in WSD's last phase",
    "start_weight_decay": "weight decay at the start, where it grows",
    "end_weight_decay": "weight decay at the end, where it grows",
    "weight_decay_incr_style": "how the weight decay grows",
    "override_opt_param_scheduler": "take the schedule from these flags, not from the checkpoint that is loaded",
    "use_checkpoint_opt_param_scheduler": "take the schedule from the checkpoint that is loaded, not from these flags",
    "save": "folder of checkpoints and metrics",
    "load": "folder of checkpoints to resume from (the newest whole one), or one of its iter_ folders",
    "save_interval": "iterations between checkpoints",
    "async_save": "go on with training while a checkpoint is written (needs memory for a copy of what is saved)",
    "keep_last_checkpoints": "remove older checkpoints when a new one is complete, so that this many stay",
    "finetune": "load parameters only and start at iteration 0",
    "no_load_optim": "do not load the optimizer's state",
    "no_load_rng": "do not load the state of the random generators",
    "no_save_optim": "do not save the optimizer's state",
    "no_save_rng": "do not save the state of the random generators",
    "tensor_model_parallel_size": "ranks that each linear layer is split over",
    "pipeline_model_parallel_size": "ranks that the layers are dealt out to",
    "sequence_parallel": "split the sequence over the tensor-parallel ranks outside the linear layers",
    "num_layers_per_virtual_pipeline_stage": "interleave: layers of one virtual stage",
    "decoder_first_pipeline_num_layers": "layers of the first pipeline stage, if it holds fewer or more",
    "decoder_last_pipeline_num_layers": "layers of the last pipeline stage, if it holds fewer or more",
    "distributed_backend": "default: nccl with CUDA, else gloo",
    "distributed_timeout_minutes": "how long a rank waits for the others",
    "recompute_granularity": "recompute whole layers in the backward pass, or core attention only",
    "recompute_method": "which layers full recompute takes: uniform units of layers, or the first ones of a stage",
    "recompute_num_layers": "layers a recomputed unit (uniform), or layers a stage that are recomputed (block)",
    "distribute_saved_activations": "split the inputs kept for full recompute over the tensor-parallel ranks",
    "log_interval": "iterations between lines of the log",
    "tensorboard_dir": "folder of TensorBoard's event files",
    "wandb_project": "project at Weights & Biases; needs --wandb-exp-name",
    "wandb_exp_name": "name of the run at Weights & Biases",
    "wandb_save_dir": "folder of Weights & Biases' own files",
}


Target = Literal["config", "shape", "transformer", "nothing"]
TAKES_A_VALUE = object()


@dataclass(frozen=True)
class Flag:
    """One flag: its spellings, where its value goes (target and key), and how the value is read.

    `constant` is what a flag without a value stores; `default` is shown in the help only.
    """

    names: tuple[str, ...]
    target: Target
    key: str
    help: str
    group: str
    kind: type = str
    choices: tuple[str, ...] | None = None
    many: bool = False
    constant: Any = TAKES_A_VALUE
    default: Any = None


def served_flags() -> tuple[Flag, ...]:
    """Every flag that is served, in the order of `GROUPS`."""
    found = [*_config_flags(), *_shape_flags(), *_run_flags(), *_accepted_flags()]
    return tuple(sorted(found, key=lambda flag: GROUPS.index(flag.group)))


def sections() -> dict[str, type]:
    """Name of a part of RunConfig -> its dataclass."""
    return get_type_hints(RunConfig)


def _config_flags() -> Iterator[Flag]:
    """A flag for each field of our dataclasses; one that stands in two of them (seed) is one flag that sets both."""
    seen = set(NO_FLAG)
    for section, config_class in sections().items():
        hints = get_type_hints(config_class)
        for field in fields(config_class):
            if field.name not in seen:
                yield from _field_flags(section, field, hints[field.name])
            seen.add(field.name)


def _field_flags(section: str, field: Field[Any], annotation: Any) -> Iterator[Flag]:
    kind, choices, many = _value_of(annotation)
    names = FLAG_NAMES.get(field.name, (flag(field.name),))
    group, words = _group_of(section, field.name), _help_of(field.name)
    default = None if field.default is MISSING else field.default
    if kind is not bool:
        choices = tuple(PEFT_METHODS) if field.name == "method" else choices
        yield Flag(names, "config", field.name, words, group, kind, choices, many, default=default)
        return
    yield Flag(names, "config", field.name, words + (" (the default)" if default else ""), group, constant=True)
    if default:
        yield Flag((f"--no-{names[0][2:]}",), "config", field.name, f"not {names[0]}", group, constant=False)


def _group_of(section: str, field_name: str) -> str:
    if field_name in FIELD_GROUPS:
        return FIELD_GROUPS[field_name]
    prefix = next((prefix for prefix in PREFIX_GROUPS if field_name.startswith(prefix)), None)
    if prefix and section != "peft":
        return PREFIX_GROUPS[prefix]
    return SECTION_GROUPS.get(section, section)


def _help_of(field_name: str) -> str:
    documented = (megatron_fields(name).get(field_name) for name in SOURCES)
    return HELP.get(field_name) or next((field.help for field in documented if field), "")


def _value_of(annotation: Any) -> tuple[type, tuple[str, ...] | None, bool]:
    """(type of one value, choices, whether it takes several) of a field's type: `int | None`, `tuple[str, ...]`..."""
    if get_origin(annotation) in (UnionType, Union):
        return _value_of(next(member for member in get_args(annotation) if member is not NoneType))
    if get_origin(annotation) is tuple:
        return get_args(annotation)[0], None, True
    if get_origin(annotation) is Literal:
        return str, get_args(annotation), False
    return annotation, None, False


def _shape_flags() -> Iterator[Flag]:
    transformer = megatron_fields("TransformerConfig")
    for name in SHAPE_FIELDS:
        yield _transformer_flag("shape", transformer[name], SHAPE)
    for name, (value, words) in SHAPE_VALUES.items():
        choices = value if isinstance(value, tuple) else None
        kind = value if isinstance(value, type) else str
        yield Flag((flag(name),), "shape", name, words, SHAPE, kind, choices)
    for name, words in SHAPE_CLAIMS.items():
        yield Flag((flag(name),), "shape", name, words, SHAPE, constant=True)


def _run_flags() -> Iterator[Flag]:
    transformer = megatron_fields("TransformerConfig")
    for name in RUN_FIELDS:
        group = "optimizer and regularization" if name.endswith("_dropout") else RECOMPUTE
        yield _transformer_flag("transformer", transformer[name], group)
    for name, (key, value, words) in RUN_SWITCHES.items():
        yield Flag((name,), "transformer", key, words, RECOMPUTE, constant=value)


def _transformer_flag(target: Target, field: MegatronField, group: str) -> Flag:
    kind, choices = field.type_and_choices
    constant = True if kind is bool else TAKES_A_VALUE
    default = RUN_DEFAULTS.get(field.name)
    words = HELP.get(field.name, field.help)
    return Flag((flag(field.name),), target, field.name, words, group, kind, choices, False, constant, default)


def _accepted_flags() -> Iterator[Flag]:
    for name, reason in ACCEPTED.items():
        yield Flag((name,), "nothing", name, reason, ACCEPTED_GROUP, constant=True)
    for name, choices in ACCEPTED_VALUES.items():
        yield Flag((name,), "nothing", name, "the only format", ACCEPTED_GROUP, choices=choices)
