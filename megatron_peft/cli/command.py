"""Commands: a flag for each field of a command's settings, typed or out of the files of --config, and what it does."""

import argparse
import sys
from argparse import SUPPRESS, ArgumentParser
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any

from megatron_peft.cli.config_files import CONFIG_FLAG, KnownFlag, file_entries, split_off_files
from megatron_peft.cli.flags import Flag, flags_of, known_to_files, served_flags
from megatron_peft.cli.launch import start_processes
from megatron_peft.cli.parser import RunFlags, argparse_settings, in_a_tuple, split_at_flags, tell_error
from megatron_peft.cli.refused import NEAR, nearest
from megatron_peft.cli.version import version
from megatron_peft.config import ConfigurationError


@dataclass(frozen=True)
class Command:
    """A command: called with its words (default: the process's own), it returns the exit code.

    Args:
        description: what --help shows, as it is laid out.
        settings: a dataclass with a field for each flag; or one for each sub-command, by name.
        run: does the work, given the settings, and with `takes_run_flags` a `RunFlags` too. Returns the exit code, or
            raises ConfigurationError, which is told with exit code 2.
        program: the name in front of messages; empty: none.
        takes_run_flags: all other flags are those of `megatron-peft train`.
        shows_usage: messages stand below the usage.
    """

    description: str | None
    settings: type | Mapping[str, type]
    run: Callable[..., int]
    program: str = ""
    takes_run_flags: bool = False
    shows_usage: bool = False

    def __call__(self, argv: Sequence[str] | None = None) -> int:
        argv = sys.argv[1:] if argv is None else list(argv)
        parser, config_class, words = make_parser(self.description), self.settings, list[str]()
        if isinstance(config_class, Mapping):
            values = parse(parser, argv, self.add_arguments(parser))
            config_class = config_class[values["command"]]
        elif self.takes_run_flags:
            add_flags(parser, config_class)
            values, words = _parse_beside_a_runs(parser, argv)
        else:
            add_flags(parser, config_class)
            values = parse(parser, argv)
        try:
            if not self.takes_run_flags:
                return self.run(settings_of(config_class, values))
            run_flags = RunFlags(words, command_line=argv)
            if run_flags.unknown:
                raise ConfigurationError(*run_flags.unknown)
            return self.run(settings_of(config_class, values), run_flags)
        except ConfigurationError as error:
            if self.shows_usage:
                parser.error(str(error))
            return tell_error(error, program=self.program)

    def add_arguments(self, parser: ArgumentParser) -> Mapping[str, ArgumentParser]:
        """Add all flags, and those of a run, to list them. Returns the parsers of sub-commands."""
        if isinstance(self.settings, Mapping):
            commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
            for name, settings in self.settings.items():
                add_flags(commands.add_parser(name, help=settings.__doc__, description=settings.__doc__), settings)
            return commands.choices
        add_flags(parser, self.settings)
        if self.takes_run_flags:
            add_run_flags(parser)
        return {}


def start_ranks(command: str, run_flags: RunFlags) -> int | None:
    """Start the processes that are asked for, each of which runs the command.

    Returns:
        Their exit code; None if this process is to go on alone.
    """
    words, program = [command, *run_flags.command_line], f"megatron-peft {command}"
    return start_processes("megatron_peft", words, run_flags.launch, program)


def make_parser(description: str | None) -> ArgumentParser:
    """A parser without abbreviations, whose --help shows the description as it is laid out, and with --version."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = ArgumentParser(description=description, formatter_class=layout, allow_abbrev=False)
    parser.add_argument("--version", action="store_true", default=SUPPRESS, help="print the version and exit")
    return parser


def add_flags(parser: ArgumentParser, config_class: type) -> None:
    """A flag for each field of a command's settings, and --config. What is not typed is not stored."""
    words = "YAML files with flags as keys; typed flags override them"
    parser.add_argument(CONFIG_FLAG, nargs="+", metavar="FILE", help=words, default=SUPPRESS)
    for flag in flags_of(config_class):
        settings = argparse_settings(flag)
        if flag.names[0].startswith("-"):
            settings |= {"dest": flag.key, "required": flag.required}
        else:  # a word without a flag
            del settings["dest"]
            settings["nargs"] = ("+" if flag.required else "*") if flag.many else None
        parser.add_argument(*flag.names, default=SUPPRESS, **settings)


def add_run_flags(parser: ArgumentParser) -> None:
    """Every flag of `served_flags`, to list them: `RunFlags` reads them."""
    for flag in served_flags():
        if flag.names[0] not in parser._option_string_actions:
            parser.add_argument(*flag.names, **argparse_settings(flag)).choices = flag.choices


def settings_of(config_class: type, values: Mapping[str, Any]) -> Any:
    """An instance of those settings with what was typed. ConfigurationError: as the dataclass raises it."""
    names = {field.name for field in fields(config_class)} & values.keys()
    return config_class(**{name: in_a_tuple(values[name]) for name in names})


def parse(
    parser: ArgumentParser, argv: Sequence[str], commands: Mapping[str, ArgumentParser] | None = None
) -> dict[str, Any]:
    """What was typed, or stands in the files of --config.

    Args:
        commands: sub-commands by name, if the first word is one; a file then sets flags of that one.

    Raises:
        SystemExit: 0 after `--help`; 2 after telling what is wrong on stderr.
    """
    if commands and argv and argv[0] not in commands and not argv[0].startswith("-"):
        parser.error(unknown_command(argv[0], commands))
    command = (commands or {}).get(argv[0] if argv else "")
    start, words = ([argv[0]], argv[1:]) if command else ([], argv)
    from_files, _, typed = _words_of_files(command or parser, words)
    return vars(parser.parse_args([*start, *from_files, *typed]))


def unknown_command(name: str, commands: Iterable[str]) -> str:
    """The message about a command that is not there."""
    near = get_close_matches(name, commands, 1)
    hint = f"did you mean {near[0]}?" if near else f"the commands are {', '.join(commands)}."
    return f"{name} is not a command; {hint}"


def _parse_beside_a_runs(parser: ArgumentParser, argv: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """As `parse`; and all other words, which are flags of a run."""
    mine, a_runs, typed = _words_of_files(parser, argv, served_flags())
    for name, values in split_at_flags(typed):
        action = parser._option_string_actions.get(name)
        # Else a word behind its value would be taken for one of the run's flag before it.
        if action and action.nargs is None and len(values) > 1 and not parser._get_positional_actions():
            told = f"{name} takes one value, but {' '.join(values)} follow it: put a text with spaces into quotes."
            parser.error(told)
    values, rest = parser.parse_known_args([*mine, *typed])
    return vars(values), [*a_runs, *rest]


def _words_of_files(
    parser: ArgumentParser, argv: Sequence[str], others: Sequence[Flag] = ()
) -> tuple[list[str], list[str], list[str]]:
    """(words for `parser` out of the files of --config, those of the `others`, what was typed besides)."""
    if "--version" in argv:
        print(version())
        raise SystemExit(0)
    mine = {
        name: KnownFlag(takes_value=action.nargs != 0)
        for action in parser._actions
        for name in action.option_strings or [action.dest]
    }
    known = known_to_files(others) | mine

    def why_unknown(name: str) -> str:
        near = nearest(name, known, NEAR)
        return f"{name} is not a known flag{f'; did you mean {near}?' if near else '; --help lists them.'}"

    try:
        files, typed = split_off_files(argv)
        entries = file_entries(files, known, why_unknown)
    except ConfigurationError as error:
        parser.error("\n  - ".join(error.problems))
    words: tuple[list[str], list[str]] = [], []
    for entry in entries:
        written = [f"{entry.name}={entry.words[0]}"] if len(entry.words) == 1 else [entry.name, *entry.words]
        words[entry.name not in mine].extend(written if entry.name.startswith("-") else entry.words)
    return *words, typed
