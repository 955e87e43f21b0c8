"""The commands that ask a model: their own settings, the flags of a run, processes where they are asked for."""

import sys
from collections.abc import Callable, Sequence
from typing import Any

from megatron_peft.cli.launch import start_processes, tell_loading
from megatron_peft.cli.own_flags import read_own_flags
from megatron_peft.cli.parser import exit_with_error, typed_launch, unknown_flags
from megatron_peft.config import ConfigurationError


def ask_a_model(
    command: str,
    settings_class: type,
    description: str | None,
    argv: Sequence[str] | None,
    check: Callable[[Any], None],
    load: Callable[[], Callable[[Any, Any], None]],
) -> int:
    """Read the flags, start processes if they are asked for, and run the command in each. Returns the exit code.

    Args:
        command: its name, and that of its module in this room.
        settings_class: of its own flags.
        description: shown by --help.
        check: called with the settings before torch is imported; raises ConfigurationError.
        load: imports what takes the configuration of a run, and the settings.

    Raises:
        SystemExit: 2, after telling what is wrong with the flags.
    """
    program = f"megatron-peft {command}"
    argv = sys.argv[1:] if argv is None else list(argv)
    read_settings, flags = read_own_flags(settings_class, argv, description)
    try:
        if unknown := unknown_flags(flags):
            raise ConfigurationError(*unknown)
        settings = read_settings()
        check(settings)
    except ConfigurationError as error:
        exit_with_error(error, program=program)
    module = f"megatron_peft.commands.{command}"
    ended = start_processes(module, argv, typed_launch(flags), program, lambda environ: None)
    if ended is not None:
        return ended

    tell_loading()
    from megatron_peft.evaluation.model import run_on_a_model

    run_on_a_model(load(), settings, flags, program)
    return 0
