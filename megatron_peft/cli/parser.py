"""Megatron's flags -> typed configuration. Only this file and command.py use argparse; nothing heavy is imported.

Everything that is wrong (unknown flags, flags of Megatron that are not served, values, contradictions, also with the
checkpoint's shape and the world size) is gathered and told in one message, by rank 0 alone; every rank exits with 2.
"""

import argparse
import os
import re
import shutil
import signal
import sys
import time
from argparse import SUPPRESS, ArgumentParser
from collections.abc import Callable, Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any, NoReturn, get_args

from megatron_peft.cli.config_files import file_entries, split_off_files
from megatron_peft.cli.flags import GROUPS, TAKES_A_VALUE, Flag, Target, known_to_files, served_flags
from megatron_peft.cli.refused import WAYS_OUT_OF_VALUES, why_not_served
from megatron_peft.cli.run_file import run_file
from megatron_peft.cli.version import version
from megatron_peft.config import (
    ConfigurationError,
    ParallelConfig,
    RunConfig,
    flag,
    missing_for_training,
    missing_to_profile,
    print_failure,
    require,
    sections_of,
)
from megatron_peft.config.sources import local_model, local_tokenizer
from megatron_peft.models.shape import ModelShape, check_layout, check_lengths, compare_shape

HUB_FLAGS = {"pretrained_checkpoint": local_model, "tokenizer_model": local_tokenizer}
PROGRAM = "pretrain_peft.py"
USAGE = """
  {command} --pretrained-checkpoint FOLDER
    --train-data-path FILE.jsonl --train-iters N [--save FOLDER] [flag ...]"""
DESCRIPTION = (
    "Fine-tune a pretrained model, in full or with adapters, over tensor-, pipeline- and data-parallel ranks. Flags "
    "are Megatron's, with Megatron's meanings; they cannot be abbreviated. `megatron-peft train` takes the same flags, "
    "and with --nproc-per-node N starts the processes itself."
)
PATIENCE_SECONDS = 2.0

ShapeReader = Callable[[str], ModelShape]
Values = Mapping[str, Any]  # fields of the configuration by name


def parse_arguments(
    argv: Sequence[str] | None = None,
    environ: Mapping[str, str] = os.environ,
    read_shape: ShapeReader | None = None,
    program: str = PROGRAM,
    saved: Callable[[Values], Values] | None = None,
) -> RunConfig:
    """`read_flags`, and then `RunFlags.config_or_exit`, whose arguments these are."""
    return read_flags(argv, environ, program).config_or_exit(environ, read_shape, program, saved)


def read_config(
    argv: Sequence[str],
    environ: Mapping[str, str] = os.environ,
    read_shape: ShapeReader | None = None,
    saved: Callable[[Values], Values] | None = None,
) -> RunConfig:
    """The configuration that `argv` asks for; ConfigurationError with everything that is wrong."""
    return RunFlags(argv).config(environ, read_shape, saved)


def read_flags(
    argv: Sequence[str] | None = None, environ: Mapping[str, str] = os.environ, program: str = PROGRAM
) -> "RunFlags":
    """The flags of a run in `argv` (default: the process's own).

    Raises SystemExit: 0 after `--help` and `--version`, 2 after telling that a file of --config cannot be read. Only
    `RANK` 0 prints.
    """
    argv = sys.argv[1:] if argv is None else argv
    if "--version" in argv:
        if _is_first_rank(environ):
            print(version())
        raise SystemExit(0)
    if {"--help", "-h"} & set(argv):
        if _is_first_rank(environ):
            _build_parser(served_flags(), program).print_help()
        raise SystemExit(0)
    try:
        return RunFlags(argv)
    except ConfigurationError as error:
        exit_with_error(error, environ, program)


class RunFlags:
    """The flags of a run, read once from files and words: values by target and key, and what is wrong with them.

    Attributes:
        words: what was read.
        command_line: all words of the command, its own flags too, for the processes that it starts.
        values: target (`flags.Target`) -> key -> value.
        problems: one message for each flag that is wrong.
        unknown: messages about words that no flag explains; they are among `problems` too.
    """

    def __init__(self, words: Sequence[str], command_line: Sequence[str] | None = None) -> None:
        """Read configuration files first, so that typed flags override them.

        Raises:
            ConfigurationError: a configuration file cannot be read.
        """
        self.words, self.command_line = list(words), list(words if command_line is None else command_line)
        self.values: dict[str, dict[str, Any]] = {target: {} for target in get_args(Target)}
        self.problems: list[str] = []
        self.unknown: list[str] = []
        served = served_flags()
        self._parser, self._served = _build_parser(served), {name: each for each in served for name in each.names}
        self._spellings: dict[tuple[str, str], str] = {}
        files, typed = split_off_files(words)
        for entry in file_entries(files, known_to_files(served), why_not_served):
            self._read(entry.name, [*entry.words], f"{entry.place}: ")
        self._spellings.clear()
        for name, values in split_at_flags(typed):
            self._read(name, values)

    @property
    def launch(self) -> dict[str, Any]:
        """The values of `LaunchConfig`."""
        return self.values["launch"]

    @property
    def replica_size(self) -> int:
        """Ranks of one replica of the model."""
        config = self.values["config"]
        size = config.get("tensor_model_parallel_size", 1) * config.get("pipeline_model_parallel_size", 1)
        return max(size, 1)  # a size below 1 is told with the rest

    def config_or_exit(
        self,
        environ: Mapping[str, str] = os.environ,
        read_shape: ShapeReader | None = None,
        program: str = PROGRAM,
        saved: Callable[[Values], Values] | None = None,
    ) -> RunConfig:
        """`config`, for a program whose name is `program`.

        Raises SystemExit: 0 after `--print-config`, 2 after telling what is wrong on stderr. Only `RANK` 0 prints.
        """
        try:
            config = self.config(environ, read_shape, saved)
        except ConfigurationError as error:
            exit_with_error(error, environ, program)
        if not self.values["program"].get("print_config"):
            return config
        if _is_first_rank(environ):
            print(run_file(config, self.launch), end="")
        raise SystemExit(0)

    def config(
        self,
        environ: Mapping[str, str] = os.environ,
        read_shape: ShapeReader | None = None,
        saved: Callable[[Values], Values] | None = None,
        any_layout: bool = False,
    ) -> RunConfig:
        """The configuration of what was typed.

        Args:
            environ: `WORLD_SIZE` is the world size, 1 if it is missing.
            read_shape: the shape of the model in a checkpoint folder, or ConfigurationError; with it, flags and layout
                are held against the model as well.
            saved: for programs that ask a model and train nothing: takes the values that were typed, and gives those of
                the run that `--load` names, which hold where nothing was typed. Then neither data nor a length is
                needed.
            any_layout: the model need not divide by the run's own layout: another will be chosen.

        Raises:
            ConfigurationError: with everything that is wrong.
        """
        typed, problems = self.values["config"], list(self.problems)
        config = {**(saved(typed) if saved else {}), **typed}
        if config.get("tensor_model_parallel_size", 1) == 1:
            config.pop("sequence_parallel", None)  # as in Megatron, whose scripts give it always: nothing is split
        world_size = environ.get("WORLD_SIZE", "1")
        if not world_size.isdecimal() or int(world_size) < 1:
            raise ConfigurationError(
                *problems, f"WORLD_SIZE is {world_size!r}, not a number of processes: use torchrun."
            )
        try:
            for name, local in HUB_FLAGS.items():
                if config.get(name):
                    config[name] = local(config[name], flag(name))
        except ConfigurationError as error:
            raise ConfigurationError(*problems, *error.problems) from error
        shape_flags = dict(self.values["shape"])
        if "vocab_size" in config and config.get("tokenizer_type") != "NullTokenizer":
            shape_flags["vocab_size"] = config["vocab_size"]  # of a real tokenizer: the checkpoint's
        gathered = {"shape_flags": shape_flags, "transformer": self.values["transformer"]}
        given = {**config, **gathered, "world_size": int(world_size)}
        sections, wrong = sections_of(given)
        problems += wrong
        problems += [] if saved else missing_for_training(given)
        whole = None
        if None not in sections.values():
            try:
                whole = RunConfig(**sections)
                problems += [] if saved else missing_to_profile(whole)
            except ConfigurationError as error:
                problems += error.problems
        if read_shape and config.get("pretrained_checkpoint"):
            laid_out = {**sections, "parallel": ParallelConfig()} if any_layout else sections
            problems += _shape_problems(config["pretrained_checkpoint"], shape_flags, laid_out, read_shape)
        if problems or whole is None:
            raise ConfigurationError(*problems)
        return whole

    def _read(self, name: str, words: list[str], place: str = "") -> None:
        """One flag and the words up to the next flag; `place` is where they stand, if in a file."""
        try:
            value = self._value(name, words)
        except ConfigurationError as error:
            self.problems += [place + problem for problem in error.problems]
            return
        served = self._served[name]
        values = self.values[served.target]
        before = self._spellings.setdefault((served.target, served.key), name)
        if before not in served.names and values[served.key] != value:
            if value == "auto":  # which leaves the choice to the other flag
                return
            if values[served.key] != "auto":
                self.problems.append(f"{place}{before} and {name} contradict each other: leave one out.")
        values[served.key] = value

    def _value(self, name: str, words: list[str]) -> Any:
        if not name:
            raise ConfigurationError(f"unexpected argument {' '.join(words)}.")
        if name not in self._served:
            self.unknown.append(why_not_served(name))
            raise ConfigurationError(self.unknown[-1])
        served = self._served[name]
        if served.constant is not TAKES_A_VALUE:
            require(not words, f"{name} takes no value, but {' '.join(words)} follows it.")
            return served.constant
        require(len(words) <= 1 or served.many, f"{name} takes one value, but {' '.join(words)} follow it.")
        try:  # joined by `=`, a value may start with a dash
            namespace = self._parser.parse_args([f"{name}={words[0]}"] if len(words) == 1 else [name, *words])
        except argparse.ArgumentError as error:
            way_out = WAYS_OUT_OF_VALUES.get(name)
            raise ConfigurationError(f"{name}: {error.message}{f'; {way_out}' if way_out else ''}.") from error
        (value,) = vars(namespace).values()
        return in_a_tuple(value)


def in_a_tuple(value: Any) -> Any:
    """What argparse gives; several values as a tuple."""
    return tuple(value) if isinstance(value, list) else value


def split_at_flags(argv: Sequence[str]) -> list[tuple[str, list[str]]]:
    """`a --lr 1 --split=9,1 --bf16` -> ("", [a]), (--lr, [1]), (--split, [9,1]), (--bf16, [])."""
    parts: list[tuple[str, list[str]]] = [("", [])]
    for word in argv:
        if re.match(r"--|-[^\d.]", word):
            name, equals, value = word.partition("=")
            parts.append((name, [value] if equals else []))
        else:
            parts[-1][1].append(word)
    return [(name, words) for name, words in parts if name or words]


def exit_with_error(
    error: ConfigurationError, environ: Mapping[str, str] = os.environ, program: str = PROGRAM
) -> NoReturn:
    """Tell what is wrong as `tell_error` does, and exit with 2 on every rank."""
    raise SystemExit(tell_error(error, environ, program))


def tell_error(error: ConfigurationError, environ: Mapping[str, str] = os.environ, program: str = PROGRAM) -> int:
    """Tell on rank 0 what is wrong, all of it in one message on stderr. Returns the exit code of every rank, 2.

    torchrun kills all ranks when one exits, so the others wait for rank 0 to print its message.
    """
    if _is_first_rank(environ):
        lines = error.problems if len(error.problems) == 1 else ("found several problems:", *error.problems)
        print_failure(f"{program}: error: ".removeprefix(": ") + "\n  - ".join(lines), environ)
        return 2
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(2))  # as if it had exited by itself
    try:
        time.sleep(PATIENCE_SECONDS)
    finally:
        signal.signal(signal.SIGTERM, previous)
    return 2


def _is_first_rank(environ: Mapping[str, str]) -> bool:
    return environ.get("RANK", "0") == "0"


def _shape_problems(
    folder: str, shape_flags: Mapping[str, Any], parts: Mapping[str, Any], read_shape: ShapeReader
) -> list[str]:
    """What contradicts the model; sections that could not be built are left out."""
    try:
        shape = read_shape(folder)
    except ConfigurationError as error:
        return list(error.problems)
    from megatron_peft.models.families import check_adapters

    return [
        *compare_shape(shape_flags, shape),
        *(check_layout(parts["parallel"], shape) if parts["parallel"] else []),
        *(check_adapters(parts["peft"], parts["parallel"], shape) if parts["peft"] and parts["parallel"] else []),
        *(check_lengths(parts["data"], shape) if parts["data"] else []),
    ]


def _build_parser(served: Sequence[Flag], program: str = PROGRAM) -> ArgumentParser:
    """A parser that stores only what is typed: defaults are the dataclasses' own."""
    # A script is started by torchrun; the program starts its processes itself.
    command = f"torchrun --nproc-per-node N {program}" if program == PROGRAM else f"{program} [--nproc-per-node N]"
    width = min(100, shutil.get_terminal_size().columns) - 2  # help stays readable on a wide terminal
    parser = ArgumentParser(
        prog=program,
        usage=USAGE.format(command=command),
        description=DESCRIPTION,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32, width=width),
        argument_default=SUPPRESS,
        allow_abbrev=False,
        exit_on_error=False,
    )
    groups = {title: parser.add_argument_group(title) for title in GROUPS}
    for each in served:
        groups[each.group].add_argument(*each.names, **argparse_settings(each))
    return parser


def argparse_settings(served: Flag) -> dict[str, Any]:
    """Keyword arguments for `add_argument`."""
    words = served.help.replace("%", "%%")
    settings: dict[str, Any] = {"dest": f"{served.target}.{served.key}", "help": words}
    if served.constant is not TAKES_A_VALUE:
        return settings | {"action": "store_const", "const": served.constant}
    shown = " ".join(map(str, served.default or ())) if served.many else served.default
    if shown not in (None, ""):
        settings["help"] += f" (default: {shown})"
    if served.choices and served.metavar and served.checks_choices:  # they are too long to stand in front
        settings["help"] += f" (one of {', '.join(served.choices)})".replace("%", "%%")
    settings["nargs"] = "+" if served.many else None
    if served.choices and served.checks_choices:
        return settings | {"choices": served.choices, "metavar": served.metavar}
    named = f"{{{','.join(served.choices)}}}" if served.choices else served.metavar
    metavar = named or {int: "N", float: "X", str: "TEXT", Path: "PATH"}[served.kind]
    kind = _number if served.kind is float else served.kind
    return settings | {"type": kind, "metavar": metavar}


def _number(text: str) -> float:
    value = float(text)
    if not isfinite(value):
        raise ValueError(text)
    return value


_number.__name__ = "number"  # argparse says: invalid number value
