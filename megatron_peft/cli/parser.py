"""Words -> flags -> typed configuration. Only this file and command.py use argparse; nothing heavy is imported.

Everything that is wrong (unknown flags, flags of Megatron that are not served, values, contradictions, also with the
checkpoint's shape and the world size) is gathered and told in one message, by rank 0 alone; every rank exits with 2.
"""

import os
import re
import signal
import sys
import time
from argparse import ArgumentError, ArgumentParser
from collections.abc import Callable, Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any, get_args

from megatron_peft.cli.config_files import CONFIG_FLAG, file_entries, run_file
from megatron_peft.cli.flags import Flag, Target, nearest, not_known, reason_of, served_flags, way_out, why_not_served
from megatron_peft.config import ConfigurationError, ParallelConfig, RunConfig, flag, print_failure, require
from megatron_peft.config.run import missing_to_profile, sections_of
from megatron_peft.config.sources import local_model, local_tokenizer
from megatron_peft.config.training import missing_for_training
from megatron_peft.models.shape import ModelShape, check_layout, check_lengths, check_quantized, compare_shape

HUB_FLAGS = {"pretrained_checkpoint": local_model, "tokenizer_model": local_tokenizer}
PROGRAM = "pretrain_peft.py"
PATIENCE_SECONDS = 2.0

ShapeReader = Callable[[str], ModelShape]
Values = Mapping[str, Any]  # fields of the configuration by name


def read_config(
    argv: Sequence[str],
    environ: Mapping[str, str] = os.environ,
    read_shape: ShapeReader | None = None,
    saved: Callable[[Values], Values] | None = None,
) -> RunConfig:
    """The configuration that `argv` asks for; ConfigurationError with everything that is wrong."""
    return RunFlags(argv).config(environ, read_shape, saved)


class RunFlags:
    """The flags of a command, read once from files and words: values by target and key, and what is wrong with them.

    program: the command's name, for messages.
    command_line: all words, for the processes that the command starts.
    words: those that are flags of a run.
    values: target (`flags.Target`) -> key -> value.
    problems: one message for each flag that is wrong, and for each word that no flag explains.
    refused: whether one of them is about such a word, or about a flag of the command itself.
    """

    def __init__(
        self, words: Sequence[str], own: Sequence[Flag] = (), takes_run_flags: bool = True, program: str = PROGRAM
    ) -> None:
        """Read configuration files first, so that typed flags override them.

        `own`: flags of the command itself; one without dashes takes the words that follow no flag. With
        `takes_run_flags` all others are those of a run. Raises ConfigurationError: a file cannot be read.
        """
        self.command_line, self.words, self.program = list(words), list[str](), program
        self.values: dict[str, dict[str, Any]] = {target: {} for target in get_args(Target)}
        self.problems: list[str] = []
        self.refused = False
        self._takes_run_flags = takes_run_flags
        self._served = {name: each for each in (served_flags() if takes_run_flags else ()) for name in each.names}
        self._served |= {name: each for each in own for name in each.names}
        self._spellings: dict[tuple[str, str], str] = {}

        parts = split_at_flags(words)
        files = [values for name, values in parts if name == CONFIG_FLAG]
        require(all(map(all, files)) and [] not in files, f"{CONFIG_FLAG} needs a file: {CONFIG_FLAG} run.yaml.")
        for entry in file_entries(sum(files, []), self._served, self._why_unknown):
            self._read(entry.name, [*(entry.words or ())], f"{entry.place}: ")
        self._spellings.clear()

        free, unflagged = next((each for each in own if not each.names[0].startswith("-")), None), list[str]()
        for name, values in parts:
            served = self._served.get(name)
            if free and (served or not name):
                num_taken = 0 if not served or not served.takes_value else len(values) if served.many else 1
                unflagged += values[num_taken:]
                values = values[:num_taken]
            if name != CONFIG_FLAG and (name or values):
                self._read(name, values)
        if free and unflagged:
            self._read(free.names[0], unflagged)
        absent = [each for each in own if each.required and each.key not in self.values["command"]]
        missing = [each.names[0] if each.names[0].startswith("-") else each.metavar or each.names[0] for each in absent]
        if missing:
            self.problems.append(f"the following arguments are required: {', '.join(missing)}.")
            self.refused = True

    @property
    def launch(self) -> dict[str, Any]:
        return self.values["launch"]

    @property
    def replica_size(self) -> int:
        """Ranks of one replica of the model."""
        config = self.values["config"]
        size = config.get("tensor_model_parallel_size", 1) * config.get("pipeline_model_parallel_size", 1)
        return max(size, 1)  # a size below 1 is told with the rest

    @property
    def num_processes(self) -> int:
        """Ranks that the launch flags start; where these give no number for a node, those of one replica."""
        number = self.launch.get("nproc_per_node", "gpu")
        return int(number) * self.launch.get("nnodes", 1) if number.isdecimal() else self.replica_size

    def config(
        self,
        environ: Mapping[str, str] = os.environ,
        read_shape: ShapeReader | None = None,
        saved: Callable[[Values], Values] | None = None,
        any_layout: bool = False,
    ) -> RunConfig:
        """The configuration of what was typed.

        environ: `WORLD_SIZE` is the world size, 1 if it is missing.
        read_shape: the shape of the model in a checkpoint folder, or ConfigurationError; with it, flags and layout
            are held against the model as well.
        saved: for programs that ask a model and train nothing: takes the values that were typed, and gives those of
            the run that `--load` names, which hold where nothing was typed. Then neither data, nor a length, nor
            --save is needed.
        any_layout: the model need not divide by the run's own layout: another will be chosen.

        Raises ConfigurationError: with everything that is wrong.
        Raises SystemExit: 0 after `--print-config`. Only `RANK` 0 prints.
        """
        typed, problems = self.values["config"], list(self.problems)
        config = {**({"save": "never written", **saved(typed)} if saved else {}), **typed}
        if config.get("tensor_model_parallel_size", 1) == 1:
            config.pop("sequence_parallel", None)  # as in Megatron, whose scripts give it always: nothing is split
        world_size = environ.get("WORLD_SIZE", "1")
        message = f"WORLD_SIZE is {world_size!r}, not a number of processes: use torchrun."
        if not world_size.isdecimal() or int(world_size) == 0:
            raise ConfigurationError(*problems, message)
        for name, local in HUB_FLAGS.items():
            try:
                if config.get(name):
                    config[name] = local(config[name], flag(name))
            except ConfigurationError as error:
                problems += error.problems
                read_shape = None if name == "pretrained_checkpoint" else read_shape
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
        if self.values["program"].get("print_config"):
            if is_first_rank(environ):
                print(run_file(whole, self.launch, unset=() if "save" in typed else ("save",)), end="")
            raise SystemExit(0)
        return whole

    def _read(self, name: str, words: list[str], place: str = "") -> None:
        """One flag and the words up to the next flag; `place` is where they stand, if in a file."""
        served = self._served.get(name)
        try:
            value = self._value(name, served, words)
        except ConfigurationError as error:
            self.problems += [place + problem for problem in error.problems]
            self.refused |= served is None or served.target == "command"
            if served and served.target == "command":
                self.values["command"].setdefault(served.key, None)  # it was given
            return
        assert served is not None
        if served.target != "command":
            joined = len(words) == 1 and words[0].startswith("-")
            self.words += [f"{name}={words[0]}"] if joined else [name, *words]
        values, field = self.values[served.target], (served.target, served.key)
        if served.adds_up and field in self._spellings:  # typed before, not in a file
            value = (*values[served.key], *value)
        before = self._spellings.setdefault(field, name)
        if before not in served.names and values[served.key] != value:
            if value == "auto":  # which leaves the choice to the other flag
                return
            if values[served.key] != "auto":
                self.problems.append(f"{place}{before} and {name} contradict each other: leave one out.")
        values[served.key] = value

    def _value(self, name: str, served: Flag | None, words: list[str]) -> Any:
        require(bool(name), f"unexpected argument {' '.join(words)}.")
        if served is None:
            raise ConfigurationError(self._why_unknown(name))
        if not served.takes_value:
            require(not words, f"{name} takes no value, but {' '.join(words)} follows it.")
            return served.constant
        way = ": put a text with spaces into quotes" if served.kind is str and not served.choices else ""
        require(len(words) <= 1 or served.many, f"{name} takes one value, but {' '.join(words)} follow it{way}.")
        parser = ArgumentParser(add_help=False, exit_on_error=False)
        parser.add_argument("--value", **argparse_settings(served))
        try:  # joined by `=`, a value may start with a dash
            namespace = parser.parse_args([f"--value={words[0]}"] if len(words) == 1 else ["--value", *words])
        except ArgumentError as error:
            advice = way_out(name, reason_of(name[2:])) if served.choices else None
            raise ConfigurationError(f"{name}: {error.message}{f'; {advice}' if advice else ''}.") from error
        return tuple(namespace.value) if served.many else namespace.value

    def _why_unknown(self, name: str) -> str:
        known = [known for known in self._served if known.startswith("-")]
        is_megatrons = self._takes_run_flags or reason_of(name[2:])
        return why_not_served(name, known) if is_megatrons else not_known(name, nearest(name, known))


def split_at_flags(words: Sequence[str]) -> list[tuple[str, list[str]]]:
    """`a --lr 1 --split=9,1 --bf16` -> ("", [a]), (--lr, [1]), (--split, [9,1]), (--bf16, [])."""
    parts: list[tuple[str, list[str]]] = [("", [])]
    for word in words:
        if re.match(r"(--|-[^\d.\s])[^\s=]*(=|\Z)", word):  # a text in quotes, which has spaces, is no flag
            name, equals, value = word.partition("=")
            parts.append((name, [value] if equals else []))
        else:
            parts[-1][1].append(word)
    return parts


def tell_error(error: ConfigurationError, environ: Mapping[str, str] = os.environ, program: str = PROGRAM) -> int:
    """Tell on rank 0 what is wrong, all of it in one message on stderr. Returns the exit code of every rank, 2.

    torchrun kills all ranks when one exits, so the others wait for rank 0 to print its message.
    """
    if is_first_rank(environ):
        lines = error.problems if len(error.problems) == 1 else ("found several problems:", *error.problems)
        print_failure(f"{program}: error: " + "\n  - ".join(lines), environ)
        return 2
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(2))  # as if it had exited by itself
    try:
        time.sleep(PATIENCE_SECONDS)
    finally:
        signal.signal(signal.SIGTERM, previous)
    return 2


def is_first_rank(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether this process speaks for all."""
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

    tp = parts["parallel"] and parts["parallel"].tensor_model_parallel_size
    return [
        *compare_shape(shape_flags, shape),
        *(check_layout(parts["parallel"], shape) if parts["parallel"] else []),
        *(check_adapters(parts["peft"], parts["parallel"], shape) if parts["peft"] and parts["parallel"] else []),
        *(check_lengths(parts["data"], shape) if parts["data"] else []),
        *(check_quantized(parts["model"], tp, shape) if parts["model"] and tp else []),
    ]


def argparse_settings(served: Flag) -> dict[str, Any]:
    """Keyword arguments for `add_argument`."""
    words = served.help.replace("%", "%%")
    if not served.takes_value:
        return {"help": words, "action": "store_const", "const": served.constant}
    shown = " ".join(map(str, served.default or ())) if served.many else served.default
    if shown not in (None, ""):
        words += f" (default: {shown})"
    choices = served.choices if served.checks_choices else None
    if choices and served.metavar:  # they are too long to stand in front
        words += f" (one of {', '.join(choices)})".replace("%", "%%")
    settings: dict[str, Any] = {"help": words, "nargs": "+" if served.many else None}
    if choices:
        return settings | {"choices": choices, "metavar": served.metavar}
    named = f"{{{','.join(served.choices)}}}" if served.choices else served.metavar
    metavar = named or {int: "N", float: "X", str: "TEXT", Path: "PATH"}[served.kind]
    return settings | {"type": _number if served.kind is float else served.kind, "metavar": metavar}


def _number(text: str) -> float:
    value = float(text)
    if not isfinite(value):
        raise ValueError(text)
    return value


_number.__name__ = "number"  # argparse says: invalid number value
