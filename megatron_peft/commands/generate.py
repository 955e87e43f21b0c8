r"""Generate answers to a prompt or a file of prompts, with a base model or a trained one.

megatron-peft generate --load RUN --prompt $'English: Open file\nFrench:' --stop "\n"
megatron-peft generate --pretrained-checkpoint FOLDER --prompt-file prompts.jsonl --output answers.jsonl

--nproc-per-node N, with the layout flags of `megatron-peft train`, splits the model. All other flags are those of
`megatron-peft train`. --load uses the model that a run trained, without repeating the run's flags. See
docs/evaluation.md.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any

from megatron_peft.cli.own_flags import ArgumentParser, add_flags, add_run_flags
from megatron_peft.commands.on_a_model import ask_a_model
from megatron_peft.config.evaluation import AnswerSettings


def add_arguments(parser: ArgumentParser) -> None:
    """Its own flags, and those of `megatron-peft train`."""
    add_flags(parser, AnswerSettings)
    add_run_flags(parser)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 2 for whatever the user can put right: flags, files, checkpoints, prompts that are too long."""
    return ask_a_model("generate", AnswerSettings, __doc__, argv, lambda settings: None, _load)


def _load() -> Callable[[Any, Any], None]:
    from megatron_peft.evaluation.answers import answer

    return answer


if __name__ == "__main__":
    sys.exit(main())
