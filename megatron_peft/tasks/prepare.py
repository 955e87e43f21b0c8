"""A task of lm-evaluation-harness as training reads it, and its folder: training and validation files, test items, task
files. docs/benchmark-tasks.md has them.

No test item is in the training files. The folder appears when all of it is written.
"""

import glob
import hashlib
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache, cached_property
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any

import yaml

from megatron_peft.checkpoint.folders import check_new, new_folder
from megatron_peft.config import ConfigurationError, Requirements, require
from megatron_peft.config.templates import render_task
from megatron_peft.config.untrusted import parse_yaml, read_text

TASKS = Path(__file__).parent / "templates"
DEFAULT_DELIMITER = " "  # the harness's, between prompt and target


class TaskLoader(yaml.SafeLoader):
    """YAML in which `!function NAME` is the name. Some of the harness's own files have a key twice."""


TaskLoader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))  # type: ignore[arg-type]


def split_task_file(text: str) -> tuple[str, str]:
    """(where the items come from, the task of the harness): what stands above the first line --- and what below."""
    declared, line, task = text.partition("\n---\n")
    return (declared, task) if line else ("", text)


class TaskTemplate:
    """The task `name` of the harness, read for training as well: training prompts and completions are rendered exactly
    as the harness renders them. `changes` (old text -> new) are made in the text of the file, folder/NAME.yaml.
    """

    def __init__(self, name: str, changes: Mapping[str, str] | None = None, folder: Path = TASKS) -> None:
        self.name = name
        _, self.text = split_task_file(read_text(folder / f"{name}.yaml"))
        for old, new in (changes or {}).items():
            require(self.text.count(old) == 1, f"the template {name} does not hold {old!r} once.")
            self.text = self.text.replace(old, new)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The task as the harness reads it. Raises ConfigurationError: it makes no prompt or no completion."""
        settings = parse_yaml(self.text, f"the template {self.name}", TaskLoader)
        for key in ("task", "doc_to_text", "doc_to_target"):
            has_text = isinstance(settings, dict) and isinstance(settings.get(key), str)
            require(has_text, f"the template {self.name} has no text for {key}.")
        return settings

    @property
    def task(self) -> str:
        return self.settings["task"]

    def prompt(self, fields: Mapping[str, Any]) -> str:
        return self._render("doc_to_text", fields)

    def completion(self, fields: Mapping[str, Any]) -> str:
        """The right answer after it: the right choice, or the target text, after the delimiter."""
        target = self.settings["doc_to_target"]
        answer = fields[target] if target in fields else self._render("doc_to_target", fields)
        if choices := self.settings.get("doc_to_choice"):
            require(
                str(answer) in map(str, range(len(choices))),
                f"the template {self.name}: doc_to_target is {answer}, and doc_to_choice has {len(choices)} choices.",
            )
            answer = choices[int(answer)]
        return self.settings.get("target_delimiter", DEFAULT_DELIMITER) + str(answer)

    def filled(self, data_files: Mapping[str, Path]) -> str:
        """The task file whose data are `data_files` (split -> JSON lines), by absolute path.

        `datasets` reads a path as a pattern.
        """
        paths = {split: glob.escape(str(path.absolute())) for split, path in data_files.items()}
        lines = [f"    {split}: {json.dumps(path)}" for split, path in paths.items()]
        return "\n".join([self.text.rstrip(), "dataset_path: json", "dataset_kwargs:", "  data_files:", *lines, ""])

    def _render(self, key: str, fields: Mapping[str, Any]) -> str:
        try:
            return render_task(self.settings[key], fields)
        except ConfigurationError as error:
            raise ConfigurationError(f"the template {self.name}: {key} fails: {error}") from error


WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Document:
    """An item: what fills the templates, and what identifies it.

    An item with the words of one of its `texts` is the same item; the first text decides the split (`with_deciding`).
    `fragments` may not appear inside another item's texts either (a solution).
    """

    fields: Mapping[str, Any]  # as the task's template names them
    texts: tuple[str, ...]
    place: str  # FILE, line N
    fragments: tuple[str, ...] = ()


def normalized(text: str) -> str:
    """The words of `text`: NFKC, case folded, without punctuation and spaces."""
    return " ".join(WORD.findall(unicodedata.normalize("NFKC", text).casefold()))


def with_deciding(documents: Iterable[Document]) -> Iterator[tuple[Document, Document]]:
    """Each item, and the one whose first text decides the split of both.

    Items that share a text, also by way of others, have the same one: the first in the order of their first texts.
    Items of several texts are held in memory.
    """
    rest = iter(documents)
    kept = list(islice(rest, 1))
    if not kept or len(kept[0].texts) == 1:  # the hash of an only text is enough
        yield from ((document, document) for document in chain(kept, rest))
        return
    kept += rest
    above: dict[str, str] = {}  # text -> another one of the same items, or itself

    def top(text: str) -> str:
        while (next_one := above.setdefault(text, text)) != text:
            above[text] = text = above[next_one]
        return text

    shared = [[text for text in map(normalized, document.texts) if text] or [""] for document in kept]
    for first, *others in shared:
        for text in others:
            above[top(text)] = top(first)
    deciding: dict[str, Document] = {}
    for document, (text, *_) in zip(kept, shared, strict=True):
        pair = deciding.get(top(text), document), document
        deciding[top(text)] = min(pair, key=lambda document: normalized(document.texts[0]))
    yield from ((document, deciding[top(text)]) for document, (text, *_) in zip(kept, shared, strict=True))


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
            shares = f"--valid-percent {self.valid_percent:g} and --test-percent {self.test_percent:g}"
            message = f"{shares} leave nothing to train on: their sum must be below 100."
            unmet(self.valid_percent + self.test_percent < 100, message)

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
        """Note a test item, so that `match` finds it again among training items."""
        for text in document.texts:
            self._places.setdefault(normalized(text), document.place)
        for text in map(normalized, document.fragments):
            if beginning := next(_windows(text), ""):
                self._fragments.setdefault(beginning, []).append((text, document.place))

    def match(self, document: Document) -> str | None:
        """The place of the test item that `document` is, or of which it contains a fragment; None without one."""
        texts = [text for text in map(normalized, document.texts) if text]
        if known := [self._places[text] for text in texts if text in self._places]:
            return known[0]
        for text in texts if self._fragments else ():
            for fragment, place in (pair for window in _windows(text) for pair in self._fragments.get(window, ())):
                if f" {fragment} " in f" {text} ":
                    return place
        return None


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
    """What `prepare` makes a folder from."""

    training: TaskTemplate | None  # of training records
    documents: Iterable[Document] = ()  # to be split into train and valid
    tests: Sequence[Tests] = ()  # at most one of them without documents, which then gets the split's test part
    held_out: Iterable[Document] = ()  # these may not be in the training data either


@dataclass
class Prepared:
    """What was written: `counts` of lines by file, and of 'removed' items, of which `example` is the first."""

    folder: Path
    tasks: tuple[str, ...]
    counts: Counter[str] = field(default_factory=Counter)
    example: str = ""


def prepare(benchmark: BenchmarkData, folder: Path, split: HashSplit, overlap: str = "remove") -> Prepared:
    """Write `folder`, which must not exist yet.

    overlap: what to do with a training item that is also a test item, 'remove' it or raise an 'error' with both places.
    """
    require(overlap in OVERLAPS, f"--overlap is {overlap}; it must be {' or '.join(OVERLAPS)}.")
    names = [tests.file.removesuffix(".jsonl") for tests in benchmark.tests]
    outside = [name for name in names if not re.fullmatch(r"[\w.+-]+", name) or name.startswith(".")]
    require(not outside, f"--task-name {' '.join(outside)} is not a valid file name: use letters, digits, . _ + and -.")
    check_new(folder)
    done = Prepared(folder, tuple(template.task for tests in benchmark.tests for template in tests.tasks))
    with new_folder(folder) as draft:
        with ExitStack() as files:

            @cache
            def opened(name: str) -> IO[str]:
                return files.enter_context((draft / name).open("w", encoding="utf-8"))

            def write(name: str, record: Mapping[str, Any]) -> None:
                opened(name).write(json.dumps(record, ensure_ascii=False) + "\n")
                done.counts[name] += 1

            _write_items(benchmark, split, overlap, done, write)
        for tests in benchmark.tests:
            require(
                done.counts[tests.file] > 0,
                f"no item for {', '.join(template.task for template in tests.tasks)}: give a file of test items, or a "
                "--test-percent above 0.",
            )
            for template in tests.tasks:
                data_files = {"test": folder / tests.file}  # where it will be once the draft is renamed
                if "fewshot_split" in template.settings:
                    data_files[template.settings["fewshot_split"]] = folder / FEWSHOT
                (draft / f"{template.name}.yaml").write_text(template.filled(data_files), encoding="utf-8")
    return done


def _write_items(
    benchmark: BenchmarkData, split: HashSplit, overlap: str, done: Prepared, write: Callable[[str, Any], None]
) -> None:
    """Write test items, solved examples, train and valid, and count in `done` what is left out."""
    test_items, counts, tested_by_split = TestItems(), done.counts, None
    for tests in benchmark.tests:  # first: what they hold must not get into the training data
        for document in tests.documents:
            write(tests.file, document.fields)
            test_items.add(document)
        if not counts[tests.file]:
            tested_by_split = tests.file
    for document in benchmark.held_out:
        test_items.add(document)
    if benchmark.training is None:
        return
    settings = [template.settings for tests in benchmark.tests for template in tests.tasks]
    # The solved items that each task shows before a question, without --num-fewshot.
    examples = [task["num_fewshot"] for task in settings if "fewshot_split" in task]
    most_examples = max(MOST_EXAMPLES, *examples) if examples else 0
    for document, deciding in with_deciding(benchmark.documents):
        if (tested := test_items.match(document)) is not None:
            shared = f"{document.place} is the test item of {tested}"
            message = f"{shared}, so it may not be trained on. --overlap remove leaves such items out."
            require(overlap != "error", message)
            done.example = done.example or shared
            counts["removed"] += 1
            continue
        part, template = split.split_of(deciding), benchmark.training
        if part == "test" and tested_by_split is not None:
            write(tested_by_split, document.fields)
            continue
        if part != "valid" and counts[FEWSHOT] < most_examples:
            write(FEWSHOT, document.fields)
        record = {"prompt": template.prompt(document.fields), "completion": template.completion(document.fields)}
        write("valid.jsonl" if part == "valid" else "train.jsonl", record)
    empty = [name for name in ["train.jsonl", *["valid.jsonl"] * (split.valid_percent > 0)] if not counts[name]]
    require(
        not empty,
        f"{' and '.join(empty)} would be empty: {counts['train.jsonl'] + counts['valid.jsonl']} items to train on, and "
        f"{counts['removed']} left out that are test items. Give more items, another --valid-percent (0: no validation "
        "file) or another --seed.",
    )
    needed = max(examples, default=0)
    message = f"{needed} solved items are shown before each question, and there are {counts[FEWSHOT]} to train on."
    require(counts[FEWSHOT] >= needed, message)
