r"""Generate answers to a prompt or a file of prompts, with a base model or a trained one.

megatron-peft generate --load RUN --prompt $'English: Open file\nFrench:' --stop "\n"
megatron-peft generate --pretrained-checkpoint FOLDER --prompt-file prompts.jsonl --output answers.jsonl

--nproc-per-node N, with the layout flags of `megatron-peft train`, splits the model. All other flags are those of
`megatron-peft train`. --load uses the model that a run trained, without repeating the run's flags. See
docs/evaluation.md.
"""

from collections.abc import Callable
from typing import Any

from megatron_peft.cli.command import Command
from megatron_peft.cli.launch import start_processes, tell_loading
from megatron_peft.cli.parser import RunFlags
from megatron_peft.config import RunConfig
from megatron_peft.config.evaluation import AnswerSettings


def run(settings: AnswerSettings, run_flags: RunFlags) -> int:
    """Answer the prompts."""

    def load() -> Callable[[RunConfig, Any], None]:
        from megatron_peft.evaluation.answers import answer

        return answer

    return ask_a_model("generate", settings, run_flags, load)


def ask_a_model(
    command: str, settings: Any, run_flags: RunFlags, load: Callable[[], Callable[[RunConfig, Any], None]]
) -> int:
    """Start processes if they are asked for, and run the command in each. Returns the exit code.

    Args:
        command: its name.
        load: imports what takes the configuration of a run, and the settings.

    Raises:
        SystemExit: 2, after telling what is wrong with the flags.
    """
    program, words = f"megatron-peft {command}", [command, *run_flags.command_line]
    ended = start_processes("megatron_peft", words, run_flags.launch, program, lambda environ: None)
    if ended is not None:
        return ended
    tell_loading()
    from megatron_peft.evaluation.model import run_on_a_model

    run_on_a_model(load(), settings, run_flags, program)
    return 0


main = Command(__doc__, AnswerSettings, run, "megatron-peft generate", takes_run_flags=True)
