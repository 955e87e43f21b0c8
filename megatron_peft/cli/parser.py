"""Words -> flags -> typed configuration. Only this file and command.py use argparse; nothing heavy is imported.

Everything that is wrong (unknown flags, flags of Megatron that are not served, values, contradictions, also with the
checkpoint's shape and the world size) is reported in one message, by rank 0 alone; every rank exits with 2.
"""

import os
import re
import signal
import sys
import time
from argparse import Action, ArgumentParser, Namespace
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, get_args

from megatron_peft.cli.config_files import file_entries, run_file
from megatron_peft.cli.flags import CONFIG, Flag, Target, nearest, not_known, reason_of, served_flags, why_not_served
from megatron_peft.config import ConfigurationError, ParallelConfig, RunConfig, flag, print_failure, require
from megatron_peft.config.run import missing_to_profile, sections_of
from megatron_peft.config.sources import local_model, local_tokenizer
from megatron_peft.config.training import missing_for_training
from megatron_peft.models.shape import ModelShape, check_layout, check_lengths, check_quantized, compare_shape

HUB_FLAGS = {"pretrained_checkpoint": local_model, "tokenizer_model": local_tokenizer}
PROGRAM = "pretrain_peft.py"
PATIENCE_SECONDS = 2.0
NEGATIVE_NUMBER = re.compile(r"-[\d.]")  # also -1e-3, which argparse takes for a flag before Python 3.14
FLAG = re.compile(r"(--|-[^\d.\s])[^\s=]*(=|\Z)")  # a text in quotes, which has spaces, is none

ShapeReader = Callable[[str], ModelShape]
Values = Mapping[str, Any]  # fields of the configuration by name
Given = dict[tuple[Target, str], tuple[Flag, list[str], Any]]  # (target, key) -> flag, its words, their value


def read_config(
    argv: Sequence[str],
    environ: Mapping[str, str] = os.environ,
    read_shape: ShapeReader | None = None,
    saved: Callable[[Values], Values] | None = None,
) -> RunConfig:
    """Return the configuration that `argv` asks for; ConfigurationError with everything that is wrong."""
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
        self.command_line, self.program = list(words), program
        self.problems: list[str] = []
        self.refused = False
        self._takes_run_flags = takes_run_flags
        flags = (*(served_flags() if takes_run_flags else [CONFIG]), *own)
        self._known = {name: each for each in flags for name in each.names}

        found = Namespace(flags=[])
        _, rest = _parser(flags).parse_known_args(self.command_line, found)
        given = self._read_files([file for each, files in found.flags if each is CONFIG for file in files or [""]])
        given |= self._read_words(found.flags, rest, next((each for each in own if not each.is_option), None))

        self.values: dict[str, dict[str, Any]] = {target: {} for target in get_args(Target)}
        for (target, key), (_, _, value) in given.items():
            self.values[target][key] = value
        of_run = [one for one in given.values() if one[0].target != "command"]
        self.words = [word for each, values, _ in of_run for word in each.command_line(values)]
        absent = [each for each in own if each.required and each.key not in self.values["command"]]
        missing = [each.names[0] if each.is_option else each.metavar or each.names[0] for each in absent]
        if missing:
            self.problems.append(f"the following arguments are required: {', '.join(missing)}.")
            self.refused = True

    @property
    def launch(self) -> dict[str, Any]:
        return self.values["launch"]

    @property
    def replica_size(self) -> int:
        """Return the number of ranks of one replica of the model."""
        config = self.values["config"]
        size = config.get("tensor_model_parallel_size", 1) * config.get("pipeline_model_parallel_size", 1)
        return max(size, 1)  # a size below 1 is told with the rest

    @property
    def num_processes(self) -> int:
        """Return the number of ranks that the launch flags start; without a number for a node, those of one replica."""
        number = self.launch.get("nproc_per_node", "gpu")
        return int(number) * self.launch.get("nnodes", 1) if number.isdecimal() else self.replica_size

    def config(
        self,
        environ: Mapping[str, str] = os.environ,
        read_shape: ShapeReader | None = None,
        saved: Callable[[Values], Values] | None = None,
        any_layout: bool = False,
    ) -> RunConfig:
        """Return the configuration of what was given.

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

    def _read_files(self, files: Sequence[str]) -> Given:
        """Return what the files set; later ones override earlier ones."""
        require("" not in files, "--config needs a file: --config run.yaml.")
        given: Given = {}
        unreadable: list[str] = []
        for file in files:
            of_file: Given = {}
            try:
                for entry in file_entries(file, self._known, self._why_unknown):
                    field = entry.flag.target, entry.flag.key
                    name = entry.flag.names[0]
                    if entry.words is not None:
                        self._store(of_file, entry.flag, entry.words, f"{entry.place}: ")
                    elif field in given and given[field][0].names[0] in (name, f"--no-{name[2:]}"):
                        del given[field]
            except ConfigurationError as error:
                unreadable += error.problems
            given |= of_file
        if unreadable:
            raise ConfigurationError(*unreadable)
        return given

    def _read_words(self, found: Sequence[tuple[Flag, list[str]]], rest: list[str], free: Flag | None) -> Given:
        """Return what typed flags set; `free` takes the words that follow no flag, of which the `rest` has some."""
        typed: Given = {}
        unknown = [word for word in rest if FLAG.match(word)]  # words behind one belong to it
        unflagged = rest[: rest.index(unknown[0])] if unknown else rest
        for each, values in found:
            surplus = values[each.takes_value :] if free and not each.many else []
            if not {*surplus} <= {*self.command_line}:  # `--loud=true`
                surplus = []
            unflagged += surplus
            if each is not CONFIG:
                self._store(typed, each, values[: len(values) - len(surplus)])
        if free and unflagged:
            self._store(typed, free, sorted(unflagged, key=self.command_line.index))
        elif unflagged:
            self.problems.append(f"unexpected argument {' '.join(unflagged)}.")
        self.problems += [self._why_unknown(word.partition("=")[0]) for word in unknown]
        self.refused |= bool(unknown or unflagged and not free)
        return typed

    def _store(self, given: Given, each: Flag, words: list[str], place: str = "") -> None:
        """Read the words of a flag; `place` is where they stand, if in a file."""
        field = each.target, each.key
        before, words_before, old = given.get(field, (each, [], ()))
        try:
            value = each.read(words)
        except ConfigurationError as error:
            self.problems += [place + problem for problem in error.problems]
            if each.target == "command":
                self.refused = True
                given.setdefault(field, (each, [], None))  # it was given
            return
        if each.append and old:
            words, value = words_before + words, old + value
        if before is not each and old not in (value, "auto"):
            if value == "auto":  # which leaves the choice to the other flag
                return
            self.problems.append(f"{place}{before.names[0]} and {each.names[0]} contradict each other: leave one out.")
        given[field] = each, words, value

    def _why_unknown(self, name: str) -> str:
        known = [known for known in self._known if known.startswith("-")]
        is_megatrons = self._takes_run_flags or reason_of(name[2:])
        return why_not_served(name, known) if is_megatrons else not_known(name, nearest(name, known))


class _Record(Action):
    """Record a flag with the words that follow it."""

    def __call__(self, parser: ArgumentParser, namespace: Namespace, values: Any, option_string: Any = None) -> None:
        namespace.flags.append((self.const, values))


@cache
def _parser(flags: tuple[Flag, ...]) -> ArgumentParser:
    """Return a parser that finds flags, with as many words as follow: `Flag.read` tells which are wrong."""
    parser = ArgumentParser(add_help=False, allow_abbrev=False, conflict_handler="resolve")
    parser._negative_number_matcher = NEGATIVE_NUMBER
    for each in flags:
        if each.is_option:
            parser.add_argument(*each.names, action=_Record, const=each, nargs="*")
    return parser


def tell_error(error: ConfigurationError, environ: Mapping[str, str] = os.environ, program: str = PROGRAM) -> int:
    """Report on rank 0 what is wrong, all of it in one message on stderr. Returns the exit code of every rank, 2.

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
    """Return True if this process reports for all."""
    return environ.get("RANK", "0") == "0"


def _shape_problems(
    folder: str, shape_flags: Mapping[str, Any], parts: Mapping[str, Any], read_shape: ShapeReader
) -> list[str]:
    """Return what contradicts the model; sections that could not be built are left out."""
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
