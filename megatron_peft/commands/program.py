"""`megatron-peft`: one program for everything. A command's module is imported only when it is called."""

import signal
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

from megatron_peft.cli.version import version

if TYPE_CHECKING:
    from megatron_peft.cli.command import ArgumentParser

DATA_COMMANDS: Mapping[str, tuple[str, str]] = {
    "prepare": ("prepare", "training data and evaluation tasks from a benchmark's public files"),
    "preprocess": ("preprocess", "JSON lines to Megatron's indexed datasets"),
    "preview": ("preview", "what training will see: samples, lengths, packing, steps per epoch"),
}
# Command -> (module of this room, or a table of commands like this one; one line for --help).
COMMANDS: Mapping[str, tuple[Any, str]] = {
    "train": ("train", "fine-tune a model; takes Megatron's flags"),
    "plan": ("plan", "what a run will hold, send and cost, before it starts, at any size"),
    "data": (DATA_COMMANDS, "prepare, preprocess and preview training data"),
    "convert": ("convert", "move weights and adapters between Hugging Face, PEFT and Megatron; merge; verify"),
    "generate": ("generate", "answer prompts with a base model or a trained one"),
    "evaluate": ("evaluate", "score a model on tasks of lm-evaluation-harness"),
    "certify": ("certify", "prove here that a run of many processes trains the model that one would"),
    "experiment": ("experiment", "run a grid of models, tasks, methods and seeds"),
    "report": ("report", "tables and plots of a run or an experiment"),
    "demo": ("demo", "fine-tune a real 135M Llama on this machine"),
    "bench": ("bench", "measure step time, memory, collectives and loading"),
    "check-gpu": ("check_gpu", "try on one GPU, in ten minutes, what was only counted without one"),
    "completion": ("completion", "print a script that completes commands and flags in a shell"),
}
DESCRIPTION = "Parameter-efficient fine-tuning on megatron-core, over tensor-, pipeline- and data-parallel ranks."
DATA_DESCRIPTION = """Look at data, prepare it, or convert it to Megatron's indexed datasets.

megatron-peft data prepare BENCHMARK ...  training data and evaluation tasks from a benchmark's public files
megatron-peft data preprocess ...         JSON lines to .bin and .idx, with the flags of Megatron's own tool
megatron-peft data preview ...            what training will see: samples, lengths, packing, steps per epoch
Each has its own --help.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code of the command; 2 for an unknown one."""
    return run_command("megatron-peft", COMMANDS, DESCRIPTION, sys.argv[1:] if argv is None else argv)


def run_command(program: str, commands: Mapping[str, tuple[Any, str]], description: str, argv: Sequence[str]) -> int:
    """Run the command that the first word names, with the words after it.

    Args:
        program: the words before it, for usage and messages.
        commands: a table like `COMMANDS`.
    """
    name, *words = argv or ["--help"]
    if name in ("--version", "-V"):
        print(version())
        return 0
    if name in commands:
        sys.argv[0] = f"{program} {name}"  # argparse names the program by it
        module, _ = commands[name]
        if isinstance(module, Mapping):
            return run_command(f"{program} {name}", module, DATA_DESCRIPTION, words)
        try:
            return import_module(f"megatron_peft.commands.{module}").main(words)
        except KeyboardInterrupt:
            print(f"{program} {name}: interrupted", file=sys.stderr)
            return 128 + signal.SIGINT
    from megatron_peft.cli.command import make_parser, unknown_command  # with all flags, which a version does not need

    parser = make_parser(description)
    parser.prog, parser.usage = program, f"{program} COMMAND [flag ...]"
    parser.epilog = f"{program} COMMAND --help lists the flags of a command."
    listed = parser.add_subparsers(title="commands", metavar="")
    for command, (_, summary) in commands.items():
        listed.add_parser(command, help=summary)
    if name in ("--help", "-h"):
        parser.print_help()
        return 0
    is_of_data = name in DATA_COMMANDS
    parser.error(
        f"{name} is not a command; did you mean data {name}?" if is_of_data else unknown_command(name, commands)
    )


def add_commands(parser: "ArgumentParser", commands: Mapping[str, tuple[Any, str]]) -> None:
    """All commands with their flags, which imports their modules."""
    listed = parser.add_subparsers()
    for name, (module, summary) in commands.items():
        command_parser = listed.add_parser(name, help=summary)
        if isinstance(module, Mapping):
            add_commands(command_parser, module)
            continue
        command = import_module(f"megatron_peft.commands.{module}")
        (command if hasattr(command, "add_arguments") else command.main).add_arguments(command_parser)


if __name__ == "__main__":
    sys.exit(main())
