"""Look at data, prepare it, or convert it to Megatron's indexed datasets.

megatron-peft data prepare BENCHMARK ...  training data and evaluation tasks from a benchmark's public files
megatron-peft data preprocess ...         JSON lines to .bin and .idx, with the flags of Megatron's own tool
megatron-peft data preview ...            what training will see: samples, lengths, packing, steps per epoch
Each has its own --help.
"""

from collections.abc import Sequence

from megatron_peft.cli.own_flags import ArgumentParser
from megatron_peft.commands.program import DATA_COMMANDS, add_commands, run_command

SUMMARY = "prepare, convert and look at data"


def add_arguments(parser: ArgumentParser) -> None:
    """The commands, each with its flags."""
    add_commands(parser, DATA_COMMANDS)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 2 for bad flags and bad input."""
    return run_command("megatron-peft data", DATA_COMMANDS, __doc__, argv)
