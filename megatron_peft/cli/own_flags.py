"""Programs with flags of their own: a flag for each field of a dataclass, typed or out of the files of --config."""

import argparse
import sys
from argparse import SUPPRESS, ArgumentParser
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from difflib import get_close_matches
from typing import Any

from megatron_peft.cli.config_files import CONFIG_FLAG, KnownFlag, file_entries, split_off_files
from megatron_peft.cli.flags import Flag, flags_of, known_to_files, served_flags
from megatron_peft.cli.parser import argparse_settings, in_a_tuple, split_at_flags
from megatron_peft.cli.unknown import NEAR, nearest
from megatron_peft.cli.version import version
from megatron_peft.config import ConfigurationError


def add_flags(parser: ArgumentParser, config_class: type) -> None:
    """A flag for each field of a program's own settings, and --config. What is not typed is not stored."""
    words = "YAML files with flags as keys; typed flags override them"
    parser.add_argument(CONFIG_FLAG, nargs="+", metavar="FILE", help=words, default=SUPPRESS)
    for one in flags_of(config_class):
        settings = argparse_settings(one)
        if one.names[0].startswith("-"):
            settings |= {"dest": one.key, "required": one.required}
        else:  # a word without a flag
            del settings["dest"]
            settings["nargs"] = ("+" if one.required else "*") if one.many else None
        parser.add_argument(*one.names, default=SUPPRESS, **settings)


def add_run_flags(parser: ArgumentParser) -> None:
    """Every flag of `served_flags`, for a program that only lists them: `parse_arguments` reads them."""
    for one in served_flags():
        if one.names[0] not in parser._option_string_actions:
            parser.add_argument(*one.names, **argparse_settings(one)).choices = one.choices


def settings_of(config_class: type, values: Mapping[str, Any]) -> Any:
    """An instance of those settings with what was typed. ConfigurationError: as the dataclass raises it."""
    own = {one.name for one in fields(config_class)} & values.keys()
    return config_class(**{name: in_a_tuple(values[name]) for name in own})


def own_parser(description: str | None) -> ArgumentParser:
    """A parser for a program with flags of its own; --help shows the description as it is laid out."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = ArgumentParser(description=description, formatter_class=layout, allow_abbrev=False)
    parser.add_argument("--version", action=ShowVersion)
    return parser


def parse_own(
    parser: ArgumentParser, argv: Sequence[str] | None, commands: Mapping[str, ArgumentParser] | None = None
) -> dict[str, Any]:
    """What was typed for a program with flags of its own, or stands in the files of --config.

    Args:
        commands: sub-commands by name, if the first word is one; a file then sets flags of that one.

    Raises:
        SystemExit: 0 after `--help`; 2 after telling what is wrong on stderr.
    """
    argv = sys.argv[1:] if argv is None else argv
    if commands and argv and argv[0] not in commands and not argv[0].startswith("-"):
        parser.error(unknown_command(argv[0], commands))
    own = (commands or {}).get(argv[0] if argv else "")
    start, words = ([argv[0]], argv[1:]) if own else ([], argv)
    from_files, _, typed = _words_of_files(own or parser, words)
    return vars(parser.parse_args([*start, *from_files, *typed]))


def unknown_command(name: str, commands: Iterable[str]) -> str:
    """What is told about a command that is not there."""
    near = get_close_matches(name, commands, 1)
    hint = f"did you mean {near[0]}?" if near else f"the commands are {', '.join(commands)}."
    return f"{name} is not a command; {hint}"


def read_own_flags(
    config_class: type, argv: Sequence[str] | None, description: str | None
) -> tuple[Callable[[], Any], list[str]]:
    """A program's own settings, and what else was typed: flags of pretrain_peft.py, for `parse_arguments`.

    Returns:
        A function that makes the settings, or raises ConfigurationError; the other words.

    Raises:
        SystemExit: 0 after `--help` and `--version`; 2 after telling what is wrong with one of its own flags on stderr.
    """
    parser = own_parser(description)
    add_flags(parser, config_class)
    own, others, typed = _words_of_files(parser, sys.argv[1:] if argv is None else argv, served_flags())
    for name, values in split_at_flags(typed):
        action = parser._option_string_actions.get(name)
        # Else a word behind its value would be taken for one of the run's flag before it.
        if action and action.nargs is None and len(values) > 1 and not parser._get_positional_actions():
            told = f"{name} takes one value, but {' '.join(values)} follow it: put a text with spaces into quotes."
            parser.error(told)
    values, rest = parser.parse_known_args([*own, *typed])
    return lambda: settings_of(config_class, vars(values)), [*others, *rest]


def _words_of_files(
    parser: ArgumentParser, argv: Sequence[str], others: Sequence[Flag] = ()
) -> tuple[list[str], list[str], list[str]]:
    """(words for `parser` out of the files of --config, those of the `others`, what was typed besides)."""
    own = {
        name: KnownFlag(takes_value=action.nargs != 0)
        for action in parser._actions
        for name in action.option_strings or [action.dest]
    }
    known = known_to_files(others) | own

    def why_unknown(name: str) -> str:
        found = nearest(name, known, NEAR)
        return f"{name} is not a known flag{f'; did you mean {found}?' if found else '; --help lists them.'}"

    try:
        files, typed = split_off_files(argv)
        entries = file_entries(files, known, why_unknown)
    except ConfigurationError as error:
        parser.error("\n  - ".join(error.problems))
    words: tuple[list[str], list[str]] = [], []
    for one in entries:
        written = [f"{one.name}={one.words[0]}"] if len(one.words) == 1 else [one.name, *one.words]
        words[one.name not in own].extend(written if one.name.startswith("-") else one.words)
    return *words, typed


class ShowVersion(argparse.Action):
    """`add_argument("--version", action=ShowVersion)`; the version is looked up only when it is asked for."""

    def __init__(self, option_strings: Any, dest: str, **settings: Any) -> None:
        help = "print the version and exit"
        super().__init__(option_strings, SUPPRESS, nargs=0, default=SUPPRESS, help=help)

    def __call__(self, parser: ArgumentParser, *_: Any, **__: Any) -> None:
        print(version())
        parser.exit()
