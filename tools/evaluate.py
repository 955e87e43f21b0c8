"""Score a model on tasks of the language model evaluation harness.

python tools/evaluate.py --load RUN --tasks TASK... --include-path FOLDER --output RESULTS.json
torchrun --nproc-per-node N tools/evaluate.py ... splits the model; the layout's flags are those of pretrain_peft.py.

Every other flag is one of pretrain_peft.py. With --load the model is what that run trained, and its flags need not be
repeated; without it, the model of --pretrained-checkpoint. An evaluation that was stopped goes on where it was.
docs/evaluation.md has the details.
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
    "--output": {"required": True, "metavar": "FILE", "help": "results, as JSON; replaced at once when all is done"},
    "--overwrite": {"action": "store_true", "help": "replace other results that are at --output already"},
    "--num-fewshot": {"type": int, "metavar": "N", "help": "examples before each question (default: the task's)"},
    "--limit": {"type": float, "metavar": "N", "help": "first N questions of each task; below 1, that share of them"},
    "--batch-size": {"type": int, "default": 16, "metavar": "N", "help": "requests in a forward of a replica (16)"},
    "--apply-chat-template": {"action": "store_true", "help": "put the questions into the tokenizer's chat template"},
    "--sampling-seed": {"type": int, "default": 1234, "metavar": "N", "help": "of answers that are drawn (1234)"},
    "--log-samples": {"action": "store_true", "help": "also write every question and answer to OUTPUT.samples.jsonl"},
    "--confirm-run-unsafe-code": {"action": "store_true", "help": "allow tasks that run code which a model wrote"},
    "--unsafe-execution": {"action": "store_true", "help": "run such code with no sandbox around it"},
}


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 2 for whatever the user can put right: flags, tasks, folders, checkpoints."""
    own, flags = read_own_flags(FLAGS, argv, PROGRAM, __doc__)
    if own.pop("unsafe_execution"):
        os.environ["MEGATRON_PEFT_UNSAFE_EXECUTION"] = "1"  # for megatron_peft.evaluation.sandbox
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # these two are read when the libraries are imported
    os.environ.setdefault("TQDM_DISABLE", "1")  # the harness's bars beside ours
    try:
        require_packages("eval", "lm_eval", "rouge_score", "sacrebleu")
    except ConfigurationError as error:
        exit_with_error(error, program=PROGRAM)

    from megatron_peft.evaluation.harness_run import HarnessSettings, evaluate
    from megatron_peft.evaluation.model import run_on_a_model

    run_on_a_model(evaluate, lambda: HarnessSettings(**own), flags, PROGRAM)
    return 0


if __name__ == "__main__":
    sys.exit(main())
