r"""Generate answers to a prompt or a file of prompts, with a base model or a trained one.

python tools/generate.py --load RUN --prompt $'English: Open file\nFrench:' --stop "\n"
python tools/generate.py --pretrained-checkpoint FOLDER --prompt-file prompts.jsonl --output answers.jsonl
torchrun --nproc-per-node N tools/generate.py ... splits the model, with the layout flags of pretrain_peft.py.

All other flags are those of pretrain_peft.py. --load uses the model that a run trained, without repeating the run's
flags. See docs/evaluation.md.
"""

import sys
from collections.abc import Sequence
from typing import Any

from megatron_peft.cli.parser import read_own_flags

PROGRAM = "generate.py"
FLAGS: dict[str, dict[str, Any]] = {
    "--prompt": {"metavar": "TEXT", "help": "the prompt; the answer is printed while it is generated"},
    "--prompt-file": {"metavar": "FILE", "help": "one prompt per line, or .jsonl with prompt or messages"},
    "--output": {"metavar": "FILE", "help": "write prompts and answers as JSON lines (default: print them)"},
    "--overwrite": {"action": "store_true", "help": "replace an existing --output"},
    "--max-new-tokens": {"type": int, "default": 128, "metavar": "N", "help": "tokens per answer, at most (128)"},
    "--temperature": {"type": float, "default": 0.0, "metavar": "X", "help": "0 is greedy (0)"},
    "--top-p": {
        "type": float,
        "default": 1.0,
        "metavar": "X",
        "help": "sample from the smallest set of tokens with probability X (1)",
    },
    "--top-k": {"type": int, "default": 0, "metavar": "N", "help": "sample from the N most likely tokens (0: all)"},
    "--num-samples": {"type": int, "default": 1, "metavar": "N", "help": "answers per prompt (1)"},
    "--stop": {
        "nargs": "+",
        "default": [],
        "metavar": "TEXT",
        "help": "an answer ends before any of these; \\n is a newline",
    },
    "--chat": {
        "action": "store_true",
        "help": "treat the prompt as a user message and apply the tokenizer's chat template",
    },
    "--batch-size": {"type": int, "default": 16, "metavar": "N", "help": "answers generated together (16)"},
    "--sampling-seed": {"type": int, "default": 1234, "metavar": "N", "help": "seed of sampling (1234)"},
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
