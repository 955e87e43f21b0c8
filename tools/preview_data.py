"""Show what training will see of its data: samples token by token, lengths, truncation, packing, steps an epoch.

python tools/preview_data.py --train-data-path data.jsonl --tokenizer-model FOLDER --seq-length 2048
takes all flags of pretrain_peft.py: the line that will train shows its data with this program's name in front.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from megatron_peft.cli.parser import exit_with_error, parse_arguments, read_own_flags
from megatron_peft.config import ConfigurationError, flag
from megatron_peft.config.preview import PreviewOptions

PROGRAM = "preview_data.py"
LAYOUT = ("--tensor-model-parallel-size", "--pipeline-model-parallel-size")
NO_MODEL = "(none)"  # a model is needed for its tokenizer only
KINDS: dict[str, dict[str, Any]] = {
    "exact": {"action": "store_true"},
    "color": {"choices": ("auto", "always", "never")},
}
FLAGS = {
    flag(one.name): {
        "default": one.default,
        "help": f"{one.metadata['help']} ({one.default})",
        **KINDS.get(one.name, {"type": int, "metavar": "N"}),
    }
    for one in fields(PreviewOptions)
}


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 2 for whatever the user can put right."""
    own, rest = read_own_flags(FLAGS, argv, PROGRAM, __doc__)
    ranks = {"WORLD_SIZE": str(ranks_of_a_replica(rest))}
    config = parse_arguments(rest, ranks, program=PROGRAM, saved=without_a_model)
    base = config.model.pretrained_checkpoint

    from megatron_peft.data.preview import Batches, preview_data

    try:
        batches = Batches(config.global_batch_size, config.training.micro_batch_size)
        preview_data(config.data, batches, PreviewOptions(**own), None if base == NO_MODEL else base)
    except ConfigurationError as error:
        exit_with_error(error, program=PROGRAM)
    return 0


def ranks_of_a_replica(argv: Sequence[str]) -> int:
    """So that a command line for several ranks is accepted on one."""
    size = 1
    for name, value in zip(argv, argv[1:], strict=False):
        size *= int(value) if name in LAYOUT and value.isdecimal() else 1
    return size


def without_a_model(typed: Mapping[str, Any]) -> dict[str, Any]:
    """What the configuration of a run needs and a preview does not."""
    return {} if typed.get("pretrained_checkpoint") else {"pretrained_checkpoint": NO_MODEL}


if __name__ == "__main__":
    sys.exit(main())
