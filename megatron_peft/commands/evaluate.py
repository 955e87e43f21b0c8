"""Score a model on tasks of lm-evaluation-harness.

megatron-peft evaluate --load RUN --tasks TASK... --include-path FOLDER --output RESULTS.json

--nproc-per-node N, with the layout flags of `megatron-peft train`, splits the model. All other flags are those of
`megatron-peft train`. --load evaluates the model that a run trained, without repeating the run's flags; otherwise the
model is that of --pretrained-checkpoint. A stopped evaluation resumes where it stopped. See docs/evaluation.md.
"""

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from megatron_peft.cli.own_flags import ArgumentParser, add_flags, add_run_flags
from megatron_peft.commands.on_a_model import ask_a_model
from megatron_peft.config import require_packages
from megatron_peft.config.evaluation import HarnessSettings


def add_arguments(parser: ArgumentParser) -> None:
    """Its own flags, and those of `megatron-peft train`."""
    add_flags(parser, HarnessSettings)
    add_run_flags(parser)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 2 for whatever the user can put right: flags, tasks, folders, checkpoints."""
    return ask_a_model("evaluate", HarnessSettings, __doc__, argv, _check, _load)


def _check(settings: HarnessSettings) -> None:
    if settings.unsafe_execution:
        os.environ["MEGATRON_PEFT_UNSAFE_EXECUTION"] = "1"  # for megatron_peft.evaluation.sandbox
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # these two are read at import
    os.environ.setdefault("TQDM_DISABLE", "1")  # hides the harness's progress bars
    require_packages("eval", "lm_eval", "rouge_score", "sacrebleu")

    from megatron_peft.evaluation.task_names import require_known_tasks

    require_known_tasks(settings.tasks, settings.include_path)


def _load() -> Callable[[Any, Any], None]:
    from megatron_peft.evaluation.harness_run import evaluate

    return evaluate


if __name__ == "__main__":
    sys.exit(main())
