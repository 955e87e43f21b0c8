"""The flags that are served: a flag for each field of our dataclasses, for fields of megatron-core's, and Megatron-LM's
spelled-out names.

Nothing here parses. `served_flags()` is the whole list; `megatron_peft.cli.parser` turns it into a parser.
"""

import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any, Literal, get_type_hints

from megatron_peft.cli.config_files import KnownFlag
from megatron_peft.cli.launch import LaunchConfig
from megatron_peft.cli.megatron import MegatronField, megatron_fields
from megatron_peft.config import METHODS, SECTIONS, flag
from megatron_peft.config.errors import value_type

# Titles of --help, in order. A field may name its title; the others go to the one of their section.
GROUPS = (
    "configuration files",
    "model",
    "network size (optional; compared with the checkpoint)",
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
    "accepted for compatibility, no effect",
)
PROGRAM_GROUP, SHAPE, RECOMPUTE, ACCEPTED_GROUP = GROUPS[0], GROUPS[2], GROUPS[10], GROUPS[15]
SECTION_GROUPS = {
    "parallel": "distributed",
    "peft": "PEFT",
    "optimizer": "optimizer and regularization",
    "checkpoint": "checkpointing",
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
RUN_FIELDS = {  # -> help, if megatron-core's own does not do
    "attention_dropout": "",
    "hidden_dropout": "",
    "recompute_granularity": "recompute whole layers in the backward pass, or core attention only",
    "recompute_method": "which layers full recompute takes: uniform groups of layers, or the first ones of a stage",
    "recompute_num_layers": "layers per recomputed group (uniform), or recomputed layers per stage (block)",
    "distribute_saved_activations": "split the inputs saved for full recompute over the tensor-parallel ranks",
    "cross_entropy_loss_fusion": "fuse the steps of the loss: always so on a GPU with --bf16, never on a CPU",
    "cross_entropy_fusion_impl": "implementation of the fused loss: megatron-core's own, or Transformer Engine's",
}
RUN_DEFAULTS = {"attention_dropout": 0.0, "hidden_dropout": 0.0}  # a pretrained model is tuned without dropout

# Spelled-out names of Megatron-LM that say something about the shape: -> (type or constant, help).
SHAPE_VALUES: Mapping[str, tuple[type | tuple[str, ...], str]] = {
    "norm_epsilon": (float, "epsilon of the norms"),
    "max_position_embeddings": (int, "longest sequence of the model, in tokens"),
    "position_embedding_type": (("rope", "alibi"), "kind of position embedding"),
    "rotary_base": (float, "base of the rotary embedding"),
    "rotary_percent": (float, "fraction of a head that is rotated; always 1"),
    "rope_scaling_factor": (float, "factor of Llama 3's RoPE scaling"),
}
SHAPE_CLAIMS = {
    "group_query_attention": "query heads share keys and values",
    "use_rotary_position_embeddings": "the position embedding is rotary",
    "use_rope_scaling": "use Llama 3's RoPE scaling",
    "swiglu": "gated MLP with SiLU",
    "openai_gelu": "GELU activation with the tanh approximation",
    "disable_bias_linear": "linear layers without bias (except --add-qkv-bias)",
    "add_qkv_bias": "linear_qkv has a bias",
    "qk_layernorm": "queries and keys are normalized",
    "untie_embeddings_and_output_weights": "the output layer does not share the embedding's weight",
}
# Spelled-out names that set a field of TransformerConfig: -> (field, value, help).
ON_A_GPU = "on a GPU"
WHERE_NOTHING_IS_RECOMPUTED = "on a GPU, in full fine-tuning and with rotations of outputs"
RUN_SWITCHES: Mapping[str, tuple[str, Any, str]] = {
    "--recompute-activations": ("recompute_granularity", "selective", "same as --recompute-granularity selective"),
    "--no-bias-swiglu-fusion": ("bias_activation_fusion", False, f"do not fuse SwiGLU ({WHERE_NOTHING_IS_RECOMPUTED})"),
    "--no-bias-dropout-fusion": ("bias_dropout_fusion", False, f"do not fuse bias, dropout and residual ({ON_A_GPU})"),
    "--no-rope-fusion": ("apply_rope_fusion", False, "do not fuse the rotary embedding (with Transformer Engine)"),
    "--no-cross-entropy-loss-fusion": ("cross_entropy_loss_fusion", False, f"do not fuse the loss ({ON_A_GPU})"),
    "--no-gradient-accumulation-fusion": (
        *("gradient_accumulation_fusion", False),
        "do not add gradients inside the GEMM (full fine-tuning on a GPU with Apex's extension)",
    ),
    "--no-overlap-p2p-communication": ("overlap_p2p_comm", False, "do not overlap sends between pipeline stages"),
}
# Spelled-out names that set a field of our configuration: -> (field, value, help).
CONFIG_SWITCHES: Mapping[str, tuple[str, Any, str]] = {
    "--use-flash-attn": ("attention_backend", "flash", "same as --attention-backend flash")
}
# Flags that ask for what is always so: -> why. They change nothing.
ACCEPTED = {
    "--use-mcore-models": "models are always built with megatron-core",
    "--use-dist-ckpt": "checkpoints are always distributed",
    "--calculate-per-token-loss": "the loss is always the mean over the tokens of the global batch",
    "--accumulate-allreduce-grads-in-fp32": "gradients are always reduced in float32",
    "--attention-softmax-in-fp32": "torch and Transformer Engine compute the softmax in float32",
    "--no-masked-softmax-fusion": "megatron-core's attention, which it belongs to, is not used",
    "--no-initialization": "weights are always loaded, never initialized",
    "--no-one-logger": "NVIDIA's One Logger is not used",
    "--use-checkpoint-args": "the shape of the model is always read from --pretrained-checkpoint",
    "--no-use-tokenizer-model-from-checkpoint-args": "no checkpoint's arguments name the tokenizer",
    "--no-position-embedding": "these models have no learned position embedding",
    "--apply-layernorm-1p": "says how Megatron-LM stores the weights of norms, not what they compute",
    "--no-create-attention-mask-in-dataloader": "attention is causal without a mask of the data loader's",
}
# The same with a value: -> (type, why).
ACCEPTED_WITH_VALUE: Mapping[str, tuple[type, str]] = {
    "--init-method-std": (float, "weights are always loaded, never initialized"),
    "--tiktoken-pattern": (str, "only TikTokenizer reads it, which is not supported"),
}
# Flags of which one value is the case: -> (values, why). `refused.WAYS_OUT_OF_VALUES` answers the others.
ACCEPTED_VALUES: Mapping[str, tuple[tuple[str, ...], str]] = {
    "--ckpt-format": (("torch_dist",), "the only format"),
    "--context-parallel-size": (("1",), "no sample is split over context-parallel ranks"),
    "--expert-model-parallel-size": (("1",), "these models have no experts"),
    "--expert-tensor-parallel-size": (("1",), "these models have no experts"),
}


Target = Literal["config", "shape", "transformer", "nothing", "launch", "program"]  # where the value of a flag goes
TAKES_A_VALUE = object()


@dataclass(frozen=True)
class Flag:
    """One flag: its spellings, where its value goes (target and key), and how the value is read.

    `constant` is what a flag without a value stores; `default` is shown in the help only. `checks_choices`: the parser
    does; else the field's own class.
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
    metavar: str | None = None
    required: bool = False
    section: str = ""  # of a configuration file
    checks_choices: bool = True


def served_flags() -> tuple[Flag, ...]:
    """Every flag that is served, in the order of `GROUPS`."""
    classes = {**SECTIONS, "launch": LaunchConfig}
    of_fields = [served for section, config_class in classes.items() for served in flags_of(config_class, section)]
    every = [*_program_flags(), *of_fields, *_megatrons_flags()]
    return tuple(sorted(every, key=lambda served: GROUPS.index(served.group)))


def flags_of(config_class: type, section: str = "") -> Iterator[Flag]:
    """A flag for each field of a dataclass that is an option. A name without dashes is a word.

    Args:
        section: of a configuration file; empty for a command's own settings.
    """
    hints = get_type_hints(config_class)
    target: Target = "launch" if section == "launch" else "config"
    for field in fields(config_class):
        if "help" not in field.metadata:
            continue
        kind, choices, many = value_type(hints[field.name])
        names = field.metadata["flags"] or (flag(field.name),)
        group = field.metadata["group"] or SECTION_GROUPS.get(section, section or "options")
        default, words = None if field.default is MISSING else field.default, field.metadata["help"]
        if kind is not bool:
            is_method = field.name == "method"  # PeftConfig says why a method cannot be used
            yield Flag(
                *(names, target, field.name, words, group, kind, tuple(METHODS) if is_method else choices, many),
                default=default,
                metavar=field.metadata["metavar"],
                required=field.default is MISSING,
                section=section,
                checks_choices=not is_method,
            )
            continue
        words += " (the default)" if default else ""
        yield Flag(names, target, field.name, words, group, constant=True, section=section)
        if default:
            opposite = (f"--no-{names[0][2:]}",)
            yield Flag(opposite, target, field.name, f"disable {names[0]}", group, constant=False, section=section)


def _program_flags() -> Iterator[Flag]:
    """What every program of the package understands besides its own flags."""
    words = "YAML files with flags as keys; later files override earlier ones, and typed flags override all"
    yield Flag(("--config",), "program", "config", words, PROGRAM_GROUP, many=True, metavar="FILE")
    words = "print what would run as a configuration file, and exit"
    yield Flag(("--print-config",), "program", "print_config", words, PROGRAM_GROUP, constant=True)
    words = "check flags, data, tokenizer and checkpoint in this process, show the plan of this layout, and exit"
    yield Flag(("--dry-run",), "program", "dry_run", words, PROGRAM_GROUP, constant=True)
    words = (
        "with --dry-run: plan for 8xa100, 8xh100, or the cluster of a YAML file (default: this machine's GPUs, if any)"
    )
    yield Flag(("--cluster",), "program", "cluster", words, PROGRAM_GROUP, metavar="NAME")
    words = "on a GPU, do not rehearse rank 0 to print its planned peak of memory beside the measured one"
    yield Flag(("--no-plan",), "program", "no_plan", words, PROGRAM_GROUP, constant=True)


def _megatrons_flags() -> Iterator[Flag]:
    """Flags for fields of megatron-core's, for Megatron-LM's spelled-out names, and what is accepted without effect."""
    transformer = megatron_fields("TransformerConfig")
    for name in SHAPE_FIELDS:
        yield _transformer_flag("shape", transformer[name], SHAPE)
    for name, (value, words) in SHAPE_VALUES.items():
        choices = value if isinstance(value, tuple) else None
        kind = value if isinstance(value, type) else str
        yield Flag((flag(name),), "shape", name, words, SHAPE, kind, choices, section="model")
    for name, words in SHAPE_CLAIMS.items():
        yield Flag((flag(name),), "shape", name, words, SHAPE, constant=True, section="model")
    for name, (key, value, words) in CONFIG_SWITCHES.items():
        yield Flag((name,), "config", key, words, "model", constant=value, section="model")
    for name in RUN_FIELDS:
        group = "optimizer and regularization" if name.endswith("_dropout") else RECOMPUTE
        yield _transformer_flag("transformer", transformer[name], group)
    for name, (key, value, words) in RUN_SWITCHES.items():
        yield Flag((name,), "transformer", key, words, RECOMPUTE, constant=value, section="model")
    for name, reason in ACCEPTED.items():
        yield Flag((name,), "nothing", name, reason, ACCEPTED_GROUP, constant=True)
    for name, (kind, reason) in ACCEPTED_WITH_VALUE.items():
        yield Flag((name,), "nothing", name, reason, ACCEPTED_GROUP, kind)
    for name, (choices, reason) in ACCEPTED_VALUES.items():
        yield Flag((name,), "nothing", name, reason, ACCEPTED_GROUP, choices=choices)


def _transformer_flag(target: Target, field: MegatronField, group: str) -> Flag:
    kind, choices, _ = value_type(eval(field.annotation, dict(vars(typing))))  # megatron-core's own source
    constant = True if kind is bool else TAKES_A_VALUE
    words = RUN_FIELDS.get(field.name) or field.help
    names, default = (flag(field.name),), RUN_DEFAULTS.get(field.name)
    return Flag(
        names, target, field.name, words, group, kind, choices, constant=constant, default=default, section="model"
    )


def known_to_files(flags: Sequence[Flag]) -> dict[str, KnownFlag]:
    """Those flags as a configuration file may name them."""
    return {
        name: KnownFlag(served.constant is TAKES_A_VALUE, served.section)
        for served in flags
        if served.target != "program"
        for name in served.names
    }
