r"""Generate answers to a prompt or a file of prompts, with a base model or a trained one.

megatron-peft generate --load RUN --prompt $'English: Open file\nFrench:' --stop "\n"
megatron-peft generate --pretrained-checkpoint FOLDER --prompt-file prompts.jsonl --output answers.jsonl

--nproc-per-node N, with the layout flags of `megatron-peft train`, splits the model. All other flags are those of
`megatron-peft train`. --load uses the model that a run trained, without repeating the run's flags. See
docs/evaluation.md.
"""

from megatron_peft.cli.command import Command, start_ranks
from megatron_peft.cli.launch import tell_loading
from megatron_peft.cli.parser import RunFlags
from megatron_peft.config.evaluation import AnswerSettings


def run(settings: AnswerSettings, run_flags: RunFlags) -> int:
    """Answer the prompts."""
    ended = start_ranks("generate", run_flags)
    if ended is not None:
        return ended
    tell_loading()
    from megatron_peft.evaluation.answers import answer
    from megatron_peft.evaluation.model import run_on_a_model

    run_on_a_model(answer, settings, run_flags)
    return 0


main = Command("generate", __doc__, AnswerSettings, run, takes_run_flags=True)
