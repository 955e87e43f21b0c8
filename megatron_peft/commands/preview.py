"""Show what training will see of its data: samples token by token, lengths, truncation, packing, steps per epoch.

megatron-peft data preview --train-data-path data.jsonl --tokenizer-model FOLDER --seq-length 2048

All other flags, and files of --config, are those of `megatron-peft train`: a run's own line or file shows its data.
"""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_peft.cli.own_flags import ArgumentParser, add_flags, add_run_flags, read_own_flags
from megatron_peft.cli.parser import exit_with_error, parse_arguments, typed_values
from megatron_peft.config import ConfigurationError
from megatron_peft.config.preview import PreviewOptions

PROGRAM = "megatron-peft data preview"
LAYOUT = ("tensor_model_parallel_size", "pipeline_model_parallel_size")
NO_MODEL = "(none)"  # a model is needed for its tokenizer only


def add_arguments(parser: ArgumentParser) -> None:
    """Its own flags, and those of `megatron-peft train`."""
    add_flags(parser, PreviewOptions)
    add_run_flags(parser)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 2 for whatever the user can put right."""
    read_settings, flags = read_own_flags(PreviewOptions, argv, __doc__)
    try:
        settings: PreviewOptions = read_settings()
    except ConfigurationError as error:
        exit_with_error(error, program=PROGRAM)
    world_size = str(ranks_of_a_replica(typed_values(flags)))
    config = parse_arguments(flags, {"WORLD_SIZE": world_size}, program=PROGRAM, saved=without_a_model)
    base = config.model.pretrained_checkpoint

    try:
        settings.check(config.data)
        from megatron_peft.data.preview import Preview, show  # with numpy: a wrong flag is told at once

        sizes = config.global_batch_size, config.training.micro_batch_size
        show(Preview(config.data, settings, None if base == NO_MODEL else base, *sizes))
    except ConfigurationError as error:
        exit_with_error(error, program=PROGRAM)
    return 0


def ranks_of_a_replica(typed: Mapping[str, Any]) -> int:
    """So that the flags of a run on several ranks are accepted by one process."""
    sizes = [typed.get(name, 1) for name in LAYOUT]
    return max(sizes[0] * sizes[1], 1)


def without_a_model(typed: Mapping[str, Any]) -> dict[str, Any]:
    """What the configuration of a run needs and a preview does not."""
    return {} if typed.get("pretrained_checkpoint") else {"pretrained_checkpoint": NO_MODEL}


if __name__ == "__main__":
    sys.exit(main())
