r"""Answer a prompt, or a file of prompts, with a base model or a trained one.

python tools/generate.py --load RUN --prompt $'English: Open file\nFrench:' --stop "\n"
python tools/generate.py --pretrained-checkpoint FOLDER --prompt-file prompts.jsonl --output answers.jsonl
torchrun --nproc-per-node N tools/generate.py ... splits the model; the layout's flags are those of pretrain_peft.py.

Every other flag is one of pretrain_peft.py. With --load the model is what that run trained, and its flags need not be
repeated. docs/evaluation.md has the details.
"""

import sys
from collections.abc import Sequence
from typing import Any

from megatron_peft.cli.parser import read_own_flags

PROGRAM = "generate.py"
FLAGS: dict[str, dict[str, Any]] = {
    "--prompt": {"metavar": "TEXT", "help": "what to answer, as it stands; the answer is shown as it grows"},
    "--prompt-file": {"metavar": "FILE", "help": "a prompt a line, or JSON lines with prompt or messages (.jsonl)"},
    "--output": {"metavar": "FILE", "help": "JSON lines of prompt and answers (default: the terminal)"},
    "--overwrite": {"action": "store_true", "help": "replace a file that is at --output already"},
    "--max-new-tokens": {"type": int, "default": 128, "metavar": "N", "help": "longest answer (128)"},
    "--temperature": {"type": float, "default": 0.0, "metavar": "X", "help": "0 takes the likeliest token (0)"},
    "--top-p": {"type": float, "default": 1.0, "metavar": "X", "help": "draw from the likeliest X of probability (1)"},
    "--top-k": {"type": int, "default": 0, "metavar": "N", "help": "draw from the N likeliest tokens (0: all)"},
    "--num-samples": {"type": int, "default": 1, "metavar": "N", "help": "answers to each prompt (1)"},
    "--stop": {
        "nargs": "+",
        "default": [],
        "metavar": "TEXT",
        "help": "an answer ends before these; \\n is a new line",
    },
    "--chat": {"action": "store_true", "help": "the prompt is what a user says: use the tokenizer's chat template"},
    "--batch-size": {"type": int, "default": 16, "metavar": "N", "help": "answers that are generated together (16)"},
    "--sampling-seed": {"type": int, "default": 1234, "metavar": "N", "help": "of answers that are drawn (1234)"},
}


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 2 for whatever the user can put right: flags, files, checkpoints, prompts that are too long."""
    own, flags = read_own_flags(FLAGS, argv, PROGRAM, __doc__)

    from megatron_peft.evaluation.answers import AnswerSettings, answer
    from megatron_peft.evaluation.model import run_on_a_model

    run_on_a_model(answer, lambda: AnswerSettings(**own), flags, PROGRAM)
    return 0


if __name__ == "__main__":
    sys.exit(main())
