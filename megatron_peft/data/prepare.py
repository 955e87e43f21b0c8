"""Writes a benchmark's folder: training and validation files, test documents, task files.

    OUTPUT/train.jsonl, valid.jsonl     {"prompt", "completion"}, for --train-data-path and --valid-data-path
    OUTPUT/TASK.yaml, TASK.jsonl        a task of lm-evaluation-harness and its documents, for --include-path OUTPUT
    OUTPUT/fewshot.jsonl                training items, of which tasks may show some before each question

No test item is in the training files. The folder appears when all of it is written.
"""

import json
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from megatron_peft.config import ConfigurationError, require
from megatron_peft.data.preparation.document import Document
from megatron_peft.data.preparation.split import HashSplit, TestItems
from megatron_peft.data.preparation.template import TaskTemplate

OVERLAPS = ("remove", "error")
FEWSHOT = "fewshot.jsonl"
MOST_EXAMPLES = 64  # solved items that are kept for --num-fewshot


@dataclass(frozen=True)
class Tests:
    """What is scored: documents, the tasks that ask about them, and the file that holds them."""

    tasks: tuple[TaskTemplate, ...]
    documents: Iterable[Document] = ()
    file: str = "test.jsonl"

    __test__ = False  # no test of pytest's


@dataclass(frozen=True)
class Benchmark:
    """What a folder is made of.

    Args:
        training: the template of training records; None where nothing is trained on.
        documents: to be split into train and valid, and where no test has documents of its own, into test too.
        tests: at most one of them without documents: that one gets the split's test part.
        held_out: further documents that training may not hold, though nothing here asks about them.
    """

    training: TaskTemplate | None
    documents: Iterable[Document] = ()
    tests: Sequence[Tests] = ()
    held_out: Iterable[Document] = ()


@dataclass(frozen=True)
class Prepared:
    """What came of it: `counts` of lines by file, and of items 'removed', of which `example` is the first."""

    folder: Path
    counts: Mapping[str, int]
    example: str = ""
    tasks: tuple[str, ...] = ()


def prepare(benchmark: Benchmark, folder: Path, split: HashSplit, overlap: str = "remove") -> Prepared:
    """Write `folder`, which must not exist yet.

    `overlap` says what becomes of a training item that is also a test item: 'remove' leaves it out, 'error' raises
    ConfigurationError with both places. Raises it too for an input without any item.
    """
    require(overlap in OVERLAPS, f"--overlap is {overlap}; it is {' or '.join(OVERLAPS)}.")
    names = [tests.file.removesuffix(".jsonl") for tests in benchmark.tests]
    outside = [name for name in names if not re.fullmatch(r"[\w.+-]+", name) or name.startswith(".")]
    require(not outside, f"--task-name {' '.join(outside)} is no name of a file: use letters, digits, . _ + and -.")
    require(not folder.exists(), f"--output {folder} exists already: remove it, or name another folder.")
    with _new_folder(folder) as draft:
        with ExitStack() as files:
            written = _Writer(draft, files, split, overlap).write(benchmark)
        for tests in benchmark.tests:
            _write_tasks(tests, draft, folder)
    names = tuple(template.task for tests in benchmark.tests for template in tests.tasks)
    return Prepared(folder, written.counts, written.example, names)


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """A draft beside `folder` that takes its name at the end, or leaves nothing."""
    draft = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(draft, ignore_errors=True)
    try:
        draft.mkdir(parents=True)
        yield draft
        draft.rename(folder)
    except OSError as error:
        raise ConfigurationError(f"--output {folder} could not be written: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


@dataclass
class _Writer:
    """One preparation under way: open files by name, and what went where."""

    folder: Path
    files: ExitStack
    split: HashSplit
    overlap: str
    items: TestItems = field(default_factory=TestItems)
    counts: Counter[str] = field(default_factory=Counter)
    example: str = ""
    _open: dict[str, IO[str]] = field(default_factory=dict)
    _most_examples: int = 0

    def write(self, benchmark: Benchmark) -> "_Writer":
        """Test documents first: what they hold must not come into training."""
        tested_by_split = None
        for tests in benchmark.tests:
            if not self._write_tests(tests):
                tested_by_split = tests.file
        for document in benchmark.held_out:
            self.items.add(document)
        needed = _numbers_of_examples(benchmark)
        self._most_examples = max(MOST_EXAMPLES, *needed) if needed else 0
        if benchmark.training is not None:
            for document in benchmark.documents:
                self._place(document, benchmark.training, tested_by_split)
            self._check(max(needed, default=0))
        return self

    def _write_tests(self, tests: Tests) -> int:
        """How many documents the test has of its own."""
        before = self.counts[tests.file]
        for document in tests.documents:
            self._line(tests.file, document.fields)
            self.items.add(document)
        return self.counts[tests.file] - before

    def _place(self, document: Document, template: TaskTemplate, test_file: str | None) -> None:
        """Into train, valid or test, or nowhere."""
        if (tested := self.items.match(document)) is not None:
            self._remove(document, tested)
            return
        part = self.split.part(document)
        if part == "test" and test_file is not None:
            self._line(test_file, document.fields)
            return
        if part != "valid" and self.counts[FEWSHOT] < self._most_examples:
            self._line(FEWSHOT, document.fields)
        record = {"prompt": template.prompt(document.fields), "completion": template.completion(document.fields)}
        self._line("valid.jsonl" if part == "valid" else "train.jsonl", record)

    def _remove(self, document: Document, tested: str) -> None:
        found = f"{document.place} is the test item of {tested}"
        if self.overlap == "error":
            raise ConfigurationError(f"{found}, so it may not be trained on. --overlap remove leaves such items out.")
        self.example = self.example or found
        self.counts["removed"] += 1

    def _check(self, num_examples: int) -> None:
        wanted = ["train.jsonl", *(["valid.jsonl"] if self.split.valid_percent else [])]
        empty = [name for name in wanted if not self.counts[name]]
        trained = self.counts["train.jsonl"] + self.counts["valid.jsonl"]
        require(
            not empty,
            f"{' and '.join(empty)} would be empty: {trained} items to train on, and {self.counts['removed']} left out "
            "that are test items. Give more items, or another --valid-percent or --seed.",
        )
        examples = self.counts[FEWSHOT]
        require(
            examples >= num_examples,
            f"{num_examples} solved items are shown before each question, and there are {examples} to train on.",
        )

    def _line(self, name: str, record: Mapping[str, Any]) -> None:
        if name not in self._open:
            self._open[name] = self.files.enter_context((self.folder / name).open("w", encoding="utf-8"))
        self._open[name].write(json.dumps(record, ensure_ascii=False) + "\n")
        self.counts[name] += 1


def _numbers_of_examples(benchmark: Benchmark) -> list[int]:
    """Solved items that each task shows before a question by itself; --num-fewshot may ask for others."""
    settings = [template.settings for tests in benchmark.tests for template in tests.tasks]
    return [one["num_fewshot"] for one in settings if "fewshot_split" in one]


def _write_tasks(tests: Tests, partial: Path, folder: Path) -> None:
    """Task files name their data by the place where these will lie."""
    require(
        (partial / tests.file).exists(),
        f"no item for {', '.join(template.task for template in tests.tasks)}: give a file of test items, or a "
        "--test-percent above 0.",
    )
    for template in tests.tasks:
        data_files = {"test": folder / tests.file}
        if "fewshot_split" in template.settings:
            data_files[template.settings["fewshot_split"]] = folder / FEWSHOT
        (partial / f"{template.name}.yaml").write_text(template.filled(data_files), encoding="utf-8")
