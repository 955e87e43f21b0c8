"""Score a model on tasks of lm-evaluation-harness.

python tools/evaluate.py --load RUN --tasks TASK... --include-path FOLDER --output RESULTS.json
torchrun --nproc-per-node N tools/evaluate.py ... splits the model, with the layout flags of pretrain_peft.py.

All other flags are those of pretrain_peft.py. --load evaluates the model that a run trained, without repeating the
run's flags; otherwise the model is that of --pretrained-checkpoint. A stopped evaluation resumes where it stopped.
See docs/evaluation.md.
"""

import os
import sys
from collections.abc import Sequence
from typing import Any

from megatron_peft.cli.parser import exit_with_error, read_own_flags
from megatron_peft.config import ConfigurationError, require_packages

PROGRAM = "evaluate.py"
FLAGS: dict[str, dict[str, Any]] = {
    "--tasks": {"nargs": "+", "required": True, "metavar": "TASK", "help": "names of tasks, groups or tags"},
    "--include-path": {"nargs": "+", "default": [], "metavar": "FOLDER", "help": "folders with task files (YAML)"},
    "--output": {"required": True, "metavar": "FILE", "help": "results as JSON, written when all tasks are done"},
    "--overwrite": {"action": "store_true", "help": "replace an existing --output of another evaluation"},
    "--num-fewshot": {"type": int, "metavar": "N", "help": "solved examples per question (default: the task's)"},
    "--limit": {"type": float, "metavar": "N", "help": "first N questions of each task; below 1, that share of them"},
    "--batch-size": {"type": int, "default": 16, "metavar": "N", "help": "requests in a forward of a replica (16)"},
    "--apply-chat-template": {"action": "store_true", "help": "format questions with the tokenizer's chat template"},
    "--sampling-seed": {"type": int, "default": 1234, "metavar": "N", "help": "seed of sampled answers (1234)"},
    "--log-samples": {"action": "store_true", "help": "also write all questions and answers to OUTPUT.samples.jsonl"},
    "--confirm-run-unsafe-code": {"action": "store_true", "help": "allow tasks that run code written by a model"},
    "--unsafe-execution": {"action": "store_true", "help": "run such code without a sandbox"},
}


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 2 for errors that the user can fix: flags, tasks, folders, checkpoints."""
    own, flags = read_own_flags(FLAGS, argv, PROGRAM, __doc__)
    if own.pop("unsafe_execution"):
        os.environ["MEGATRON_PEFT_UNSAFE_EXECUTION"] = "1"  # for megatron_peft.evaluation.sandbox
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # these two are read at import
    os.environ.setdefault("TQDM_DISABLE", "1")  # hides the harness's progress bars
    from megatron_peft.evaluation.task_names import require_known_tasks

    try:
        require_packages("eval", "lm_eval", "rouge_score", "sacrebleu")
        require_known_tasks(own["tasks"], own["include_path"])
    except ConfigurationError as error:
        exit_with_error(error, program=PROGRAM)

    from megatron_peft.evaluation.harness_run import HarnessSettings, evaluate
    from megatron_peft.evaluation.model import run_on_a_model

    run_on_a_model(evaluate, lambda: HarnessSettings(**own), flags, PROGRAM)
    return 0


if __name__ == "__main__":
    sys.exit(main())
