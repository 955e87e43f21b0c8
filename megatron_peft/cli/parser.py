"""Megatron's flags -> typed configuration. With own_flags.py the only user of argparse; nothing heavy is imported.

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
from dataclasses import dataclass, field, fields
from math import isfinite
from pathlib import Path
from typing import Any, NoReturn, get_args

from megatron_peft.cli.config_files import CONFIG_FLAG, file_entries, split_off_files
from megatron_peft.cli.flags import (
    GROUPS,
    TAKES_A_VALUE,
    Flag,
    Target,
    known_to_files,
    launch_flags,
    sections,
    served_flags,
)
from megatron_peft.cli.megatron import WAYS_OUT_OF_VALUES
from megatron_peft.cli.run_file import run_file
from megatron_peft.cli.unknown import why_not_served
from megatron_peft.cli.version import version
from megatron_peft.config import (
    ConfigurationError,
    ParallelConfig,
    RunConfig,
    flag,
    missing_for_training,
    missing_to_profile,
    print_failure,
)
from megatron_peft.config.hub import local_model, local_tokenizer
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
    """The configuration that `argv` (default: the process's own) asks for; `program` is named in front of an error.

    The world size is `WORLD_SIZE` of `environ` (1 if it is missing). `read_shape` gives the shape of the model in a
    checkpoint folder, or raises ConfigurationError; with it, flags and layout are held against the model as well.

    `saved` is for programs that ask a model and train nothing: it takes the values that were typed, and gives those of
    the run that `--load` names, which hold where nothing was typed. Then neither data nor a length is needed.

    Raises SystemExit: 0 after `--help` and `--version`, 2 after telling what is wrong on stderr. Only `RANK` 0 prints.
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
        typed = _read_words(argv)
        config = _build_config(typed, environ.get("WORLD_SIZE", "1"), read_shape, saved)
        if not typed.values["program"].get("print_config"):
            return config
        if _is_first_rank(environ):
            print(run_file(config, typed.values["launch"]), end="")
        raise SystemExit(0)
    except ConfigurationError as error:
        exit_with_error(error, environ, program)


def read_config(
    argv: Sequence[str],
    environ: Mapping[str, str] = os.environ,
    read_shape: ShapeReader | None = None,
    saved: Callable[[Values], Values] | None = None,
    any_layout: bool = False,
) -> RunConfig:
    """Like `parse_arguments`, but raise ConfigurationError with everything that is wrong instead of exiting.

    With `any_layout` the model need not divide by the run's own layout: another will be chosen.
    """
    return _build_config(_read_words(argv), environ.get("WORLD_SIZE", "1"), read_shape, saved, any_layout)


def typed_values(argv: Sequence[str]) -> dict[str, Any]:
    """The fields of the configuration that were typed or stand in a file; what is wrong is told later."""
    try:
        return _read_words(argv).values["config"]
    except ConfigurationError:
        return {}


def unknown_flags(argv: Sequence[str]) -> list[str]:
    """The message for each word that no flag of a run explains; values are looked at later."""
    known = {name for one in served_flags() for name in one.names}
    found = [name for name, _ in split_at_flags(argv) if name and name not in known]
    return [why_not_served(name) for name in found]


def typed_launch(argv: Sequence[str]) -> dict[str, Any]:
    """The values of `LaunchConfig` that were typed or stand in a file; what is wrong elsewhere is told later."""
    of_launch = [CONFIG_FLAG, *(name for one in launch_flags() for name in one.names)]
    if not any(word.partition("=")[0] in of_launch for word in argv):
        return {}
    try:
        return _read_words(argv).values["launch"]
    except ConfigurationError:
        return {}


def typed_program(argv: Sequence[str]) -> dict[str, Any]:
    """What the program itself was asked for, as `dry_run`; what is wrong elsewhere is told later."""
    try:
        return _read_words(argv).values["program"]
    except ConfigurationError:
        return {}


def _read_words(argv: Sequence[str]) -> "_Typed":
    """Configuration files first, so that typed flags override them. ConfigurationError: a file cannot be read."""
    served = served_flags()
    typed = _Typed(_build_parser(served), {name: one for one in served for name in one.names})
    files, words = split_off_files(argv)
    for entry in file_entries(files, known_to_files(served), why_not_served):
        typed.read(entry.name, [*entry.words], f"{entry.place}: ")
    typed.spellings.clear()
    for name, values in split_at_flags(words):
        typed.read(name, values)
    return typed


def in_a_tuple(value: Any) -> Any:
    """What argparse gives; several values as a tuple."""
    return tuple(value) if isinstance(value, list) else value


def exit_with_error(
    error: ConfigurationError, environ: Mapping[str, str] = os.environ, program: str = PROGRAM
) -> NoReturn:
    """Tell on rank 0 what is wrong, all of it in one message on stderr, and exit with 2 on every rank."""
    if _is_first_rank(environ):
        lines = error.problems if len(error.problems) == 1 else ("found several problems:", *error.problems)
        print_failure(f"{program}: error: " + "\n  - ".join(lines), environ)
    else:
        _let_rank_0_speak()
    raise SystemExit(2)


def _let_rank_0_speak() -> None:
    """torchrun kills all ranks when one exits, so the others wait for rank 0 to print its message."""
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(2))  # as if it had exited by itself
    try:
        time.sleep(PATIENCE_SECONDS)
    finally:
        signal.signal(signal.SIGTERM, previous)


def _is_first_rank(environ: Mapping[str, str]) -> bool:
    return environ.get("RANK", "0") == "0"


@dataclass
class _Typed:
    """Parsed values by destination, and the problems found so far."""

    parser: ArgumentParser
    served: Mapping[str, Flag]
    values: dict[str, dict[str, Any]] = field(default_factory=lambda: {target: {} for target in get_args(Target)})
    spellings: dict[tuple[str, str], str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def read(self, name: str, words: list[str], place: str = "") -> None:
        """One flag and the words up to the next flag; `place` is where they stand, if in a file."""
        try:
            value = self._value(name, words)
        except ConfigurationError as error:
            self.problems += [place + problem for problem in error.problems]
        else:
            self._set(name, value, place)

    def _set(self, name: str, value: Any, place: str) -> None:
        served = self.served[name]
        values = self.values[served.target]
        before = self.spellings.setdefault((served.target, served.key), name)
        if before not in served.names and values[served.key] != value:
            if value == "auto":
                return
            if values[served.key] != "auto":  # which leaves the choice to the other flag
                self.problems.append(f"{place}{before} and {name} contradict each other: leave one out.")
        values[served.key] = value

    def _value(self, name: str, words: list[str]) -> Any:
        if not name:
            raise ConfigurationError(f"unexpected argument {' '.join(words)}.")
        if name not in self.served:
            raise ConfigurationError(why_not_served(name))
        served = self.served[name]
        if served.constant is not TAKES_A_VALUE:
            if words:
                raise ConfigurationError(f"{name} takes no value, but {' '.join(words)} follows it.")
            return served.constant
        if len(words) > 1 and not served.many:
            raise ConfigurationError(f"{name} takes one value, but {' '.join(words)} follow it.")
        return self._parsed(name, words)

    def _parsed(self, name: str, words: list[str]) -> Any:
        """argparse's reading of one flag. Joining by `=` lets a value start with a dash."""
        try:
            namespace = self.parser.parse_args([f"{name}={words[0]}"] if len(words) == 1 else [name, *words])
        except argparse.ArgumentError as error:
            way_out = WAYS_OUT_OF_VALUES.get(name)
            raise ConfigurationError(f"{name}: {error.message}{f'; {way_out}' if way_out else ''}.") from error
        (value,) = vars(namespace).values()
        return in_a_tuple(value)


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


def _build_config(
    typed: _Typed,
    world_size: str,
    read_shape: ShapeReader | None,
    saved: Callable[[Values], Values] | None,
    any_layout: bool = False,
) -> RunConfig:
    """The configuration of what was typed; ConfigurationError with everything that is wrong."""
    config = {**(saved(typed.values["config"]) if saved else {}), **typed.values["config"]}
    problems = list(typed.problems)
    if config.get("tensor_model_parallel_size", 1) == 1:
        config.pop("sequence_parallel", None)  # as in Megatron, whose scripts give it always: nothing is split
    if not world_size.isdecimal() or int(world_size) < 1:
        raise ConfigurationError(*problems, f"WORLD_SIZE is {world_size!r}, not a number of processes: use torchrun.")
    try:
        config |= _local_folders(config)
    except ConfigurationError as error:
        raise ConfigurationError(*problems, *error.problems) from error
    shape_flags = dict(typed.values["shape"])
    if "vocab_size" in config and config.get("tokenizer_type") != "NullTokenizer":
        shape_flags["vocab_size"] = config["vocab_size"]  # of a real tokenizer: the checkpoint's
    given = {
        **config,
        "world_size": int(world_size),
        "shape_flags": shape_flags,
        "transformer": typed.values["transformer"],
    }
    parts = {name: _build(config_class, given, problems) for name, config_class in sections().items()}
    problems += [] if saved else missing_for_training(given)
    whole = None if None in parts.values() else _build(RunConfig, parts, problems)
    problems += [] if saved or whole is None else missing_to_profile(whole)
    if read_shape and config.get("pretrained_checkpoint"):
        laid_out = {**parts, "parallel": ParallelConfig()} if any_layout else parts
        problems += _shape_problems(config["pretrained_checkpoint"], shape_flags, laid_out, read_shape)
    if problems or whole is None:
        raise ConfigurationError(*problems)
    return whole


def _local_folders(config: Mapping[str, Any]) -> dict[str, str]:
    """Folders for those flags that name a model or a tokenizer of the Hugging Face Hub."""
    found = {name: (config.get(name), local) for name, local in HUB_FLAGS.items()}
    return {name: local(given, flag(name)) for name, (given, local) in found.items() if given}


def _build(config_class: type, given: Mapping[str, Any], problems: list[str]) -> Any:
    """An instance from those values of `given` that are its fields, or None, with its problems added to `problems`."""
    own = {one.name for one in fields(config_class)} & given.keys()
    try:
        return config_class(**{name: given[name] for name in own})
    except ConfigurationError as error:
        problems += error.problems
        return None


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
    parser = ArgumentParser(
        prog=program,
        usage=USAGE.format(command=command),
        description=DESCRIPTION,
        formatter_class=_Formatter,
        argument_default=SUPPRESS,
        allow_abbrev=False,
        exit_on_error=False,
    )
    groups = {title: parser.add_argument_group(title) for title in GROUPS}
    for one in served:
        groups[one.group].add_argument(*one.names, **argparse_settings(one))
    return parser


def argparse_settings(served: Flag) -> dict[str, Any]:
    """Of `add_argument`, without the names."""
    words = served.help.replace("%", "%%")
    settings: dict[str, Any] = {"dest": f"{served.target}.{served.key}", "help": words}
    if served.constant is not TAKES_A_VALUE:
        return settings | {"action": "store_const", "const": served.constant}
    shown = " ".join(map(str, served.default or ())) if served.many else served.default
    if shown not in (None, ""):
        settings["help"] += f" (default: {shown})"
    if served.choices and served.metavar and served.checks_choices:  # they are too long to stand in front
        settings["help"] += f" (one of {', '.join(served.choices)})".replace("%", "%%")
    if served.choices and served.checks_choices:
        return settings | {"choices": served.choices, "metavar": served.metavar}
    named = f"{{{','.join(served.choices)}}}" if served.choices else served.metavar
    metavar = named or {int: "N", float: "X", str: "TEXT", Path: "PATH"}[served.kind]
    kind = _number if served.kind is float else served.kind
    return settings | {"type": kind, "metavar": metavar, "nargs": "+" if served.many else None}


def _number(text: str) -> float:
    value = float(text)
    if not isfinite(value):
        raise ValueError(text)
    return value


_number.__name__ = "number"  # argparse says: invalid number value


class _Formatter(argparse.HelpFormatter):
    """Help that stays readable: at most 100 columns, whatever the terminal's width."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32, width=min(100, shutil.get_terminal_size().columns) - 2)
