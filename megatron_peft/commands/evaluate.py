"""Score a model on tasks of lm-evaluation-harness.

megatron-peft evaluate --load RUN --tasks TASK... --include-path FOLDER --output RESULTS.json

--nproc-per-node N, with the layout flags of `megatron-peft train`, splits the model. All other flags are those of
`megatron-peft train`. --load evaluates the model that a run trained, without repeating the run's flags; otherwise the
model is that of --pretrained-checkpoint. A stopped evaluation resumes where it stopped. See docs/evaluation.md.
"""

import os
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
from megatron_peft.config import ConfigurationError, require_packages
from megatron_peft.config.evaluation import HarnessSettings

PROGRAM, MODULE = "megatron-peft evaluate", "megatron_peft.commands.evaluate"


def add_arguments(parser: ArgumentParser) -> None:
    """Its own flags, and those of `megatron-peft train`."""
    add_flags(parser, HarnessSettings)
    add_run_flags(parser)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 2 for whatever the user can put right: flags, tasks, folders, checkpoints."""
    argv = sys.argv[1:] if argv is None else list(argv)
    read_settings, flags = read_own_flags(HarnessSettings, argv, __doc__)
    try:
        settings: HarnessSettings = read_settings()
        if settings.unsafe_execution:
            os.environ["MEGATRON_PEFT_UNSAFE_EXECUTION"] = "1"  # for megatron_peft.evaluation.sandbox
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # these two are read at import
        os.environ.setdefault("TQDM_DISABLE", "1")  # hides the harness's progress bars
        require_packages("eval", "lm_eval", "rouge_score", "sacrebleu")

        from megatron_peft.evaluation.task_names import require_known_tasks

        require_known_tasks(settings.tasks, settings.include_path)
    except ConfigurationError as error:
        exit_with_error(error, program=PROGRAM)
    ended = start_processes(MODULE, argv, typed_launch(flags), PROGRAM, lambda environ: None)
    if ended is not None:
        return ended

    from megatron_peft.evaluation.harness_run import evaluate
    from megatron_peft.evaluation.model import run_on_a_model

    run_on_a_model(evaluate, settings, flags, PROGRAM)
    return 0


if __name__ == "__main__":
    sys.exit(main())
