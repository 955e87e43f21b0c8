"""Score a model on tasks of lm-evaluation-harness.

megatron-peft evaluate --load RUN --tasks TASK... --include-path FOLDER --output RESULTS.json

--nproc-per-node N, with the layout flags of `megatron-peft train`, splits the model. All other flags are those of
`megatron-peft train`. --load evaluates the model that a run trained, without repeating the run's flags; otherwise the
model is that of --pretrained-checkpoint. A stopped evaluation resumes where it stopped. See docs/evaluation.md.
"""

import os

from megatron_peft.cli.command import Command, start_ranks
from megatron_peft.cli.launch import tell_loading
from megatron_peft.cli.parser import RunFlags
from megatron_peft.config import require_packages
from megatron_peft.config.evaluation import HarnessSettings


def run(settings: HarnessSettings, run_flags: RunFlags) -> int:
    """Score the model."""
    if settings.unsafe_execution:
        os.environ["MEGATRON_PEFT_UNSAFE_EXECUTION"] = "1"  # for megatron_peft.evaluation.sandbox
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # these two are read at import
    os.environ.setdefault("TQDM_DISABLE", "1")  # hides the harness's progress bars
    require_packages("eval", "lm_eval", "rouge_score", "sacrebleu")

    from megatron_peft.evaluation.task_names import require_known_tasks

    require_known_tasks(settings.tasks, settings.include_path)

    ended = start_ranks("evaluate", run_flags)
    if ended is not None:
        return ended
    tell_loading()
    from megatron_peft.evaluation.harness_run import evaluate
    from megatron_peft.evaluation.model import run_on_a_model

    run_on_a_model(evaluate, settings, run_flags)
    return 0


main = Command("evaluate", __doc__, HarnessSettings, run, takes_run_flags=True)
