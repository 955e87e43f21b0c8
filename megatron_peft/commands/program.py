"""`megatron-peft`: one program for everything. A command's module is imported only when it is called."""

import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING

from megatron_peft.cli import version
from megatron_peft.runtime.exit_signals import ends_with_reader

if TYPE_CHECKING:
    from megatron_peft.cli.command import Command

# Command -> one line for --help. `train` is `main` of the module train, `data prepare` is `prepare_data` of data.
COMMANDS = {
    "train": "fine-tune a model; takes Megatron's flags",
    "plan": "what a run will hold, send and cost, before it starts, at any size",
    "data prepare": "training data and evaluation tasks from a benchmark's public files",
    "data preprocess": "JSON lines to Megatron's indexed datasets",
    "data preview": "what training will see: samples, lengths, packing, steps per epoch",
    "convert": "move weights and adapters between Hugging Face, PEFT and Megatron; merge; verify",
    "generate": "answer prompts with a base model or a trained one",
    "evaluate": "score a model on tasks of lm-evaluation-harness",
    "sync": "give a running vLLM server the newest adapter of a run",
    "certify": "prove here that a run of many processes trains the model that one would",
    "experiment": "run a grid of models, tasks, methods and seeds",
    "report": "tables and plots of a run or an experiment",
    "demo": "fine-tune a real 135M Llama on this machine",
    "bench": "measure step time, memory, collectives and loading",
    "check-gpu": "try on one GPU, in ten minutes, what was only counted without one",
    "completion": "print a script that completes commands and flags in a shell",
}
DESCRIPTION = "Parameter-efficient fine-tuning on megatron-core, over tensor-, pipeline- and data-parallel ranks."


def command(name: str) -> "Command":
    """The command of this name, whose module is imported."""
    group, _, last = name.rpartition(" ")
    module = import_module(f"megatron_peft.commands.{(group or last).replace('-', '_')}")
    return getattr(module, f"{last}_{group}" if group else "main")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code; 2 for an unknown one."""
    with ends_with_reader():
        return _main(argv)


def _main(argv: Sequence[str] | None) -> int:
    words = [*(sys.argv[1:] if argv is None else argv)] or ["--help"]
    group, *rest = words if words[0] == "data" else ("", *words)
    name = f"{group} {rest[0] if rest else '--help'}".strip()
    if name.split()[-1] in ("--version", "-V"):
        print(version())
        return 0
    program = f"megatron-peft {name}"
    if name in COMMANDS:
        sys.argv[0] = program  # argparse names the program by it
        try:
            return command(name)(rest[1:])
        except KeyboardInterrupt:
            print(f"{program}: interrupted", file=sys.stderr)
            return 128 + signal.SIGINT
    # With all flags, which a version does not need.
    from megatron_peft.cli.command import make_parser, unknown_command
    from megatron_peft.cli.parser import tell_error
    from megatron_peft.config import ConfigurationError

    if name.split()[-1] not in ("--help", "-h"):
        return tell_error(ConfigurationError(unknown_command(name, COMMANDS)), program="megatron-peft")
    parser = make_parser(DESCRIPTION)
    parser.prog = f"megatron-peft {group}".strip()
    parser.usage, parser.epilog = "%(prog)s COMMAND [flag ...]", "COMMAND --help lists the flags of a command."
    listed = parser.add_subparsers(title="commands", metavar="")
    for each, summary in COMMANDS.items():
        if each.startswith(group):
            listed.add_parser(each.removeprefix(group).strip(), help=summary)
    parser.print_help()
    return 0


if __name__ == "__main__":
    sys.exit(main())
