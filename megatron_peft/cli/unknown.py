"""What is told about a flag that is not served: a Megatron flag is refused by name, a flag of Hugging Face's trainers
gets what stands for it here, and any other the nearest flag.
"""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches

from megatron_peft.cli.flags import served_flags
from megatron_peft.cli.megatron import flags_of_fields, reason_of, refusal, refused_flags

TYPO, NEAR = 0.85, 0.6  # likeness to a flag: a slip of the finger; worth asking about
MIN_BEGINNING = 6  # letters of a flag's beginning that are not there by chance
FIELD_REASON = "a field of megatron-core that fine-tuning has no use for"


def known_flags() -> dict[str, str | None]:
    """Every flag that is known, with its dashes -> None if it is served, else why it is not.

    Besides Megatron-LM's own flags these are all fields of megatron-core's configuration classes, whatever its
    version: a field is served by a flag of `served_flags`, or it is refused; there is no third state.
    """
    of_fields = {
        name: reason_of(name[2:]) or reason_of(field_name.replace("_", "-")) or FIELD_REASON
        for name, field_name in flags_of_fields()
    }
    refused = {f"--{name}": reason for name, reason in refused_flags().items()}
    return of_fields | refused | {name: None for served in served_flags() for name in served.names}


def why_not_served(name: str) -> str:
    """The error message for a Megatron flag that is not supported, another library's flag, or an unknown one."""
    known = known_flags()
    if reason := known.get(name):
        return refusal(name, reason)
    if told := equivalent(name):
        return told
    served = [other for other, reason in known.items() if reason is None]
    bare = name.lstrip("-")
    family = reason_of(bare) or reason_of(bare.removeprefix("no-"))
    if family and not nearest(name, served, TYPO):
        return refusal(name, family)
    like = nearest(name, known, TYPO) or nearest(name, [*served, *EQUIVALENTS], NEAR)
    if not like:
        return f"{name} is not a known flag; --help lists them."
    if told := equivalent(like):  # a slip in another library's flag
        return f"{name} is not a known flag; {told}"
    not_served = "" if known[like] is None else ", a Megatron flag that is not supported"
    return f"{name} is not a known flag; did you mean {like}{not_served}?"


def nearest(name: str, others: Iterable[str], likeness: float) -> str | None:
    """The only flag that begins with `name`, or else the one most like it, if it is at least so alike (0 to 1).

    Dashes in front do not count.
    """
    bare, flags = name.lstrip("-"), [other.lstrip("-") for other in others]
    longer = [flag for flag in flags if len(bare) >= MIN_BEGINNING and flag.startswith(f"{bare}-")]
    near = longer if len(longer) == 1 else get_close_matches(bare, flags, 1, likeness)
    return f"--{near[0]}" if near else None


# Flags of Hugging Face's trainers (transformers, TRL, PEFT). People who come from there type them, with underscores or
# dashes; the nearest flag by its letters would mislead.

# What stands for them here -> their flags, without leading dashes and with dashes inside.
_EQUIVALENTS = {
    "--pretrained-checkpoint": "model-name-or-path model-name base-model model-id",
    "--tokenizer-model": "tokenizer-name tokenizer-name-or-path",
    "--save; a new run never writes into another run's folder": "output-dir overwrite-output-dir",
    "--lr": "learning-rate",
    "--train-epochs": "num-train-epochs num-epochs epochs",
    "--train-iters": "max-steps",
    "--micro-batch-size": "per-device-train-batch-size per-gpu-train-batch-size train-batch-size",
    "--micro-batch-size, for validation too": "per-device-eval-batch-size eval-batch-size",
    "--global-batch-size: --micro-batch-size x data-parallel ranks x accumulation steps": "gradient-accumulation-steps",
    "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1": "gradient-checkpointing",
    "--keep-last-checkpoints": "save-total-limit",
    "--save-interval, in iterations": "save-steps save-strategy",
    "--eval-interval, in iterations": "eval-steps eval-strategy evaluation-strategy",
    "--valid-data-path": "validation-file validation-data do-eval eval-dataset",
    "--train-data-path": "train-file dataset dataset-name dataset-path data-files training-data",
    "--log-interval, in iterations": "logging-steps logging-strategy",
    "--tensorboard-dir and --wandb-project": "report-to logging-dir",
    "--wandb-exp-name": "run-name",
    "--load, with the folder of --save": "resume-from-checkpoint",
    "--lr-warmup-iters": "warmup-steps",
    "--lr-warmup-fraction": "warmup-ratio",
    "--lr-decay-style": "lr-scheduler-type",
    "--clip-grad": "max-grad-norm",
    "--adam-eps": "adam-epsilon",
    "--optimizer": "optim",
    "--seq-length": "max-seq-length max-seq-len max-length model-max-length cutoff-len block-size",
    "--pack-sequences": "sample-packing",
    "--num-workers": "dataloader-num-workers preprocessing-num-workers",
    "--bf16": "torch-dtype dtype half-precision mixed-precision",
    "--attention-backend": "attn-implementation use-flash-attention-2 use-flash-attention flash-attn",
    "--distributed-timeout-minutes": "ddp-timeout",
    "--use-distributed-optimizer, which shards the optimizer's state, and --tensor-model-parallel-size": (
        "deepspeed fsdp fsdp-config zero-stage"
    ),
    "--nproc-per-node, with --tensor-model-parallel-size and --pipeline-model-parallel-size": (
        "device-map num-gpus num-processes"
    ),
    "--peft-method": "use-peft peft-type use-lora finetuning-type",
    "--peft-method lora-ga, with --lora-ga-init": "init-lora-weights",
    "--lora-rank": "lora-r r rank",
    "--lora-rs": "use-rslora",
    "--lora-plus-ratio": "loraplus-lr-ratio",
    "--peft-target-modules": "lora-target-modules target-modules lora-target",
    "--boft-factors": "boft-n-butterfly-factor",
    "--rotation-side": "coft",
    "megatron-peft convert export-adapter, after the run": "push-to-hub hub-model-id",
    "megatron-peft convert merge, after the run": "merge-lora merge-and-unload merge-weights",
    # What has no equivalent, and what serves the same end.
    "not supported: the base is in float32 or, with --bf16, in bfloat16. To save memory, use --recompute-granularity, "
    "--tensor-model-parallel-size or --use-distributed-optimizer": (
        "load-in-4bit load-in-8bit bits bnb-4bit-compute-dtype bnb-4bit-quant-type use-bnb-nested-quant "
        "quantization-bit quantization-config use-4bit use-8bit"
    ),
    "always the case, so leave it out": (
        "do-train completion-only-loss assistant-only-loss train-on-completions remove-unused-columns "
        "ddp-find-unused-parameters gradient-checkpointing-kwargs local-files-only"
    ),
    "never the case, so leave it out: loss is counted on completions only": "train-on-inputs",
}
EQUIVALENTS: Mapping[str, str] = {name: here for here, names in _EQUIVALENTS.items() for name in names.split()}


def equivalent(flag: str) -> str | None:
    """What to tell about a flag (with its dashes) of Hugging Face's trainers; None if it is not one."""
    here = EQUIVALENTS.get(flag.lstrip("-").replace("_", "-"))
    return f"{flag} is a flag of Hugging Face's libraries; here it is {here}." if here else None
