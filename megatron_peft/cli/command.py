"""Commands: a flag for each field of a command's settings, typed or out of the files of --config, and what it does."""

import logging
import shutil
import sys
import warnings
from argparse import SUPPRESS, Action, ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from inspect import isfunction
from pathlib import Path
from typing import Any

from megatron_peft.cli import version
from megatron_peft.cli.flags import CONFIG, Flag, flags_of, served_flags
from megatron_peft.cli.launch import start_processes
from megatron_peft.cli.parser import RunFlags, is_first_rank, tell_error
from megatron_peft.config import ConfigurationError

LIBRARY_WARNINGS = (
    # megatron-core, of its own defaults and of packages that may be missing
    *("Transformer Engine and Apex are not installed", "Apex is not installed", "full scope is deprecated"),
    # torch 2.13, of collectives that megatron-core calls
    r"`torch\.distributed\.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated",
    # megatron-core, which reads .grad of shards that are no leaves (--use-distributed-optimizer)
    "The .grad attribute of a Tensor that is not a leaf",
)


def quiet_libraries() -> None:
    """Leave out what libraries would warn of on every rank, and users of the commands cannot change."""
    for message in LIBRARY_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    # torch, on a node without GPUs where nvcc is installed (a login node), when megatron-core 0.19 asks it
    logging.getLogger("torch.utils.cpp_extension").addFilter(
        lambda record: "No CUDA runtime" not in record.getMessage()
    )


@dataclass(frozen=True)
class Command:
    """A command: called with its words (default: the process's own), it returns the exit code.

    name: the words behind `megatron-peft`, in front of messages.
    description: what --help shows, as it is laid out.
    settings: a dataclass with a field for each flag; or one for each sub-command, by name, or a function that gives
        these for the words; None: no flags of its own.
    run: does the work, given the settings, if any, and with `takes_run_flags` a `RunFlags` too. Returns the exit
        code, or raises ConfigurationError, which is told with exit code 2.
    takes_run_flags: all other flags are those of `megatron-peft train`.
    """

    name: str
    description: str | None
    settings: type | Mapping[str, type] | Callable[[Sequence[str]], Mapping[str, type]] | None
    run: Callable[..., int]
    takes_run_flags: bool = False

    def __call__(self, argv: Sequence[str] | None = None, program: str = "") -> int:
        quiet_libraries()
        words = sys.argv[1:] if argv is None else list(argv)
        program = program or f"megatron-peft {self.name}"
        try:
            if options := {"--version", "--help", "-h"} & {*words}:
                if is_first_rank():
                    print(version()) if "--version" in options else self._parser_of(words).print_help()
                return 0
            settings = self._settings(words)
            if isinstance(settings, Mapping):
                name, *words = words or [""]
                if name not in settings:
                    raise ConfigurationError(unknown_command(name, settings))
                settings, program = settings[name], f"{program} {name}"
            run_flags = RunFlags(words, [*flags_of(settings)] if settings else [], self.takes_run_flags, program)
            if settings and run_flags.refused:
                raise ConfigurationError(*run_flags.problems)
            given = [settings(**run_flags.values["command"])] if settings else []
            return self.run(*given, run_flags) if self.takes_run_flags else self.run(*given)
        except ConfigurationError as error:
            return tell_error(error, program=program)

    def add_arguments(
        self, parser: ArgumentParser, words: Sequence[str] = (), lists_run_flags: bool = True
    ) -> Mapping[str, ArgumentParser]:
        """Add all flags, those of a run too, to list them. Returns the parsers of sub-commands."""
        settings = self._settings(words)
        if isinstance(settings, Mapping):
            listed = parser.add_subparsers(metavar="COMMAND")
            for name, its_settings in settings.items():
                about: dict[str, Any] = {"help": its_settings.__doc__, "description": its_settings.__doc__}
                add_flags(listed.add_parser(name, **about), [CONFIG, *flags_of(its_settings)])
            return listed.choices
        own = [] if settings is None else [*flags_of(settings)]
        names = {name for each in own for name in each.names}
        others = served_flags() if lists_run_flags and self.takes_run_flags else [CONFIG]
        add_flags(parser, [*own, *(each for each in others if names.isdisjoint(each.names))])
        return {}

    def _parser_of(self, words: Sequence[str]) -> ArgumentParser:
        parser = make_parser(self.description)
        if self.settings is None:
            parser.usage = "%(prog)s [flag ...]"
        commands = self.add_arguments(parser, words, lists_run_flags=self.settings is None)
        return commands.get(words[0], parser)

    def _settings(self, words: Sequence[str]) -> type | Mapping[str, type] | None:
        return self.settings(words) if isfunction(self.settings) else self.settings  # pyright: ignore[reportReturnType]


def start_ranks(command: str, run_flags: RunFlags) -> int | None:
    """Start the processes that are asked for, each of which runs the command, as `start_processes` does."""
    return start_processes("megatron_peft", [command, *run_flags.command_line], run_flags.launch, run_flags.program)


def make_parser(description: str | None) -> ArgumentParser:
    """A parser for --help, which shows the description as it is laid out, and is readable on a wide terminal."""
    width = min(100, shutil.get_terminal_size().columns) - 2
    layout = partial(RawDescriptionHelpFormatter, max_help_position=32, width=width)
    parser = ArgumentParser(description=description, formatter_class=layout)
    parser.add_argument("--version", action="store_true", default=SUPPRESS, help="print the version and exit")
    return parser


def add_flags(parser: ArgumentParser, flags: Iterable[Flag]) -> None:
    """List flags under their titles. Nothing is parsed: their words are read by `RunFlags`."""
    groups: dict[str, Any] = {"options": parser}
    for each in flags:
        if each.group not in groups:
            groups[each.group] = parser.add_argument_group(each.group)
        text, settings = each.help, dict[str, Any](nargs=0)
        if each.takes_value:
            shown = " ".join(map(str, each.default or ())) if each.many else each.default
            text += f" (default: {shown})" if shown not in (None, "") else ""
            if each.choices and each.metavar:  # they are too long to stand in front
                text += f" (one of {', '.join(each.choices)})"
            value = None if each.choices else {int: "N", float: "X", str: "TEXT", Path: "PATH"}[each.kind]
            settings = {"choices": each.choices, "metavar": each.metavar or value}
            settings["nargs"] = ("+" if each.required or each.is_option else "*") if each.many else None
        settings |= {"required": each.required} if each.is_option else {}
        groups[each.group].add_argument(*each.names, action=Action, help=text.replace("%", "%%"), **settings)


def unknown_command(name: str, commands: Iterable[str]) -> str:
    """The message about a command that is not there."""
    near = get_close_matches(name, commands, 1)
    hint = f"did you mean {near[0]}?" if near else f"the commands are {', '.join(commands)}."
    return f"{name} is not a command; {hint}" if name else hint
