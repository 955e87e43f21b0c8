"""Writes the folder of a task: training and validation files, test items, task files. docs/benchmark-tasks.md has them.

No test item is in the training files. The folder appears when all of it is written.
"""

import hashlib
import json
import re
import shutil
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from megatron_peft.config import ConfigurationError, Requirements, require
from megatron_peft.tasks.template import TaskTemplate

WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Document:
    """An item: what fills the templates, and what identifies it.

    Args:
        fields: as the task's template names them.
        texts: an item with one of these texts is the same item (question, source sentence), whatever its case,
            punctuation and spaces. The first one decides the split.
        place: FILE, line N.
        fragments: texts that may not appear inside another item's either (a solution).
    """

    fields: Mapping[str, Any]
    texts: tuple[str, ...]
    place: str
    fragments: tuple[str, ...] = ()


def normalized(text: str) -> str:
    """The words of `text`: NFKC, case folded, without punctuation and spaces."""
    return " ".join(WORD.findall(unicodedata.normalize("NFKC", text).casefold()))


HASH_VALUES = 10_000  # shares are counted in hundredths of a percent
FRAGMENT_WORDS = 8  # a shorter text may appear anywhere


@dataclass(frozen=True)
class HashSplit:
    """Train, valid or test by a hash of an item's normalized text and the seed, independent of the other items."""

    valid_percent: float = 5.0
    test_percent: float = 0.0
    seed: int = 1234

    def __post_init__(self) -> None:
        with Requirements(self) as unmet:
            unmet.each("not_negative", "valid_percent", "test_percent")
            unmet(
                self.valid_percent + self.test_percent < 100,
                f"--valid-percent {self.valid_percent:g} and --test-percent {self.test_percent:g} leave nothing to "
                "train on: their sum must be below 100.",
            )

    def split_of(self, document: Document) -> str:
        """'train', 'valid' or 'test'."""
        text = f"{self.seed}\n{normalized(document.texts[0])}"
        position = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % HASH_VALUES
        test_end = self.test_percent / 100 * HASH_VALUES
        valid_end = test_end + self.valid_percent / 100 * HASH_VALUES
        return "test" if position < test_end else "valid" if position < valid_end else "train"


class TestItems:
    """The normalized texts of test items: all of them in memory."""

    __test__ = False  # no test of pytest's

    def __init__(self) -> None:
        self._places: dict[str, str] = {}
        self._fragments: dict[str, list[tuple[str, str]]] = {}  # by their first words: (fragment, place)

    def add(self, document: Document) -> None:
        """Note a test item, so that `TestItems` finds it again among training items."""
        for text in document.texts:
            self._places.setdefault(normalized(text), document.place)
        for text in map(normalized, document.fragments):
            if beginning := next(_windows(text), ""):
                self._fragments.setdefault(beginning, []).append((text, document.place))

    def match(self, document: Document) -> str | None:
        """The place of the test item that `document` is or holds, or None."""
        texts = [text for text in map(normalized, document.texts) if text]
        for text in texts:
            if text in self._places:
                return self._places[text]
        return next(filter(None, map(self._held_by, texts)), None)

    def _held_by(self, text: str) -> str | None:
        """The place of a test item with a fragment that `text` contains."""
        if not self._fragments:
            return None
        found = (pair for window in _windows(text) for pair in self._fragments.get(window, ()))
        return next((place for fragment, place in found if f" {fragment} " in f" {text} "), None)


def _windows(text: str) -> Iterator[str]:
    """Every run of FRAGMENT_WORDS words; a shorter text has none."""
    words = text.split(" ")
    for start in range(len(words) - FRAGMENT_WORDS + 1):
        yield " ".join(words[start : start + FRAGMENT_WORDS])


OVERLAPS = ("remove", "error")
FEWSHOT = "fewshot.jsonl"
MOST_EXAMPLES = 64  # solved items that are kept for --num-fewshot


@dataclass(frozen=True)
class Tests:
    """What is scored: documents, the tasks that use them, and the file that they are written to."""

    tasks: tuple[TaskTemplate, ...]
    documents: Iterable[Document] = ()
    file: str = "test.jsonl"

    __test__ = False  # no test of pytest's


@dataclass(frozen=True)
class BenchmarkData:
    """What `prepare` makes a folder from.

    Args:
        training: the template of training records; None without training data.
        documents: to be split into train and valid.
        tests: at most one of them without documents, which then gets the split's test part.
        held_out: more documents that may not be in the training data.
    """

    training: TaskTemplate | None
    documents: Iterable[Document] = ()
    tests: Sequence[Tests] = ()
    held_out: Iterable[Document] = ()


@dataclass(frozen=True)
class Prepared:
    """What was written: `counts` of lines by file, and of 'removed' items, of which `example` is the first."""

    folder: Path
    counts: Mapping[str, int]
    example: str = ""
    tasks: tuple[str, ...] = ()


def prepare(benchmark: BenchmarkData, folder: Path, split: HashSplit, overlap: str = "remove") -> Prepared:
    """Write `folder`, which must not exist yet.

    overlap: what to do with a training item that is also a test item, 'remove' it or raise an 'error' with both places.
    Raises ConfigurationError for that, and for an input without items.
    """
    require(overlap in OVERLAPS, f"--overlap is {overlap}; it must be {' or '.join(OVERLAPS)}.")
    names = [tests.file.removesuffix(".jsonl") for tests in benchmark.tests]
    outside = [name for name in names if not re.fullmatch(r"[\w.+-]+", name) or name.startswith(".")]
    require(not outside, f"--task-name {' '.join(outside)} is not a valid file name: use letters, digits, . _ + and -.")
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
    """A draft beside `folder` that is renamed to it at the end; on an error nothing is left."""
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
    """The state of one preparation: open files by name, and what was written to them."""

    folder: Path
    files: ExitStack
    split: HashSplit
    overlap: str
    items: TestItems = field(default_factory=TestItems)
    counts: Counter[str] = field(default_factory=Counter)
    example: str = ""
    _open: dict[str, IO[str]] = field(default_factory=dict)
    _most_examples: int = 0

    def write(self, benchmark: BenchmarkData) -> "_Writer":
        tested_by_split = None
        for tests in benchmark.tests:  # first: what they hold must not get into the training data
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
        """The number of the test's own documents."""
        before = self.counts[tests.file]
        for document in tests.documents:
            self._line(tests.file, document.fields)
            self.items.add(document)
        return self.counts[tests.file] - before

    def _place(self, document: Document, template: TaskTemplate, test_file: str | None) -> None:
        """Write the item to train, valid or test, or leave it out."""
        if (tested := self.items.match(document)) is not None:
            self._remove(document, tested)
            return
        part = self.split.split_of(document)
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
            "that are test items. Give more items, another --valid-percent (0: no validation file) or another --seed.",
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


def _numbers_of_examples(benchmark: BenchmarkData) -> list[int]:
    """Solved items that each task shows before a question, without --num-fewshot."""
    settings = [template.settings for tests in benchmark.tests for template in tests.tasks]
    return [one["num_fewshot"] for one in settings if "fewshot_split" in one]


def _write_tasks(tests: Tests, partial: Path, folder: Path) -> None:
    require(
        (partial / tests.file).exists(),
        f"no item for {', '.join(template.task for template in tests.tasks)}: give a file of test items, or a "
        "--test-percent above 0.",
    )
    for template in tests.tasks:
        data_files = {"test": folder / tests.file}  # where it will be once the draft is renamed
        if "fewshot_split" in template.settings:
            data_files[template.settings["fewshot_split"]] = folder / FEWSHOT
        (partial / f"{template.name}.yaml").write_text(template.filled(data_files), encoding="utf-8")
