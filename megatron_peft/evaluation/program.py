"""A program that asks a model: its settings, the flags of the model, and a world to run it in."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from megatron_peft.cli.parser import exit_with_error, parse_arguments
from megatron_peft.config import ConfigurationError, RunConfig
from megatron_peft.conversion.pretrained import read_model_shape
from megatron_peft.evaluation.run_flags import model_flags
from megatron_peft.runtime.failure import run_together
from megatron_peft.runtime.launch import world

Settings = TypeVar("Settings")


def run_on_a_model(
    main: Callable[[RunConfig, Settings], None], settings: Callable[[], Settings], flags: Sequence[str], program: str
) -> None:
    """Run `main` with the model that `flags` describe, on all processes.

    Args:
        main: takes the model's configuration and the settings, within a started world.
        settings: makes the program's own settings, or raises ConfigurationError.
        flags: those of pretrain_peft.py; what --load's run says of its model need not be among them.
        program: its name, put before an error.

    Raises:
        SystemExit: 2, after one rank has told what is wrong with the settings or the flags.
    """
    try:
        made, flags = settings(), model_flags(flags)
    except ConfigurationError as error:
        exit_with_error(error, program=program)
    config = parse_arguments(flags, read_shape=read_model_shape, program=program)
    with world(config.parallel):
        run_together(lambda: main(config, made), program=program)
