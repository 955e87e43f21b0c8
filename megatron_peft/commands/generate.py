r"""Generate answers to a prompt or a file of prompts, with a base model or a trained one.

megatron-peft generate --load RUN --prompt $'English: Open file\nFrench:' --stop "\n"
megatron-peft generate --pretrained-checkpoint FOLDER --prompt-file prompts.jsonl --output answers.jsonl

--nproc-per-node N, with the layout flags of `megatron-peft train`, splits the model. All other flags are those of
`megatron-peft train`. --load uses the model that a run trained, without repeating the run's flags. See
docs/evaluation.md.
"""

import sys
from collections.abc import Sequence

from megatron_peft.cli.launch import start_processes
from megatron_peft.cli.parser import (
    ArgumentParser,
    add_flags,
    add_run_flags,
    exit_with_error,
    read_own_flags,
    typed_launch,
)
from megatron_peft.config import ConfigurationError
from megatron_peft.config.evaluation import AnswerSettings

PROGRAM, MODULE = "megatron-peft generate", "megatron_peft.commands.generate"


def add_arguments(parser: ArgumentParser) -> None:
    """Its own flags, and those of `megatron-peft train`."""
    add_flags(parser, AnswerSettings)
    add_run_flags(parser)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 2 for whatever the user can put right: flags, files, checkpoints, prompts that are too long."""
    argv = sys.argv[1:] if argv is None else list(argv)
    read_settings, flags = read_own_flags(AnswerSettings, argv, __doc__)
    try:
        settings: AnswerSettings = read_settings()
    except ConfigurationError as error:
        exit_with_error(error, program=PROGRAM)
    ended = start_processes(MODULE, argv, typed_launch(flags), PROGRAM, lambda environ: None)
    if ended is not None:
        return ended

    from megatron_peft.evaluation.answers import answer
    from megatron_peft.evaluation.model import run_on_a_model

    run_on_a_model(answer, settings, flags, PROGRAM)
    return 0


if __name__ == "__main__":
    sys.exit(main())
