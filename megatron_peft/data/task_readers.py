"""The TSV files of GLUE's MNLI, QQP, SST-2 and QNLI, as its own archive holds them.

Labels are numbered as on the Hugging Face hub, so that templates written for either read both.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_peft.config import ConfigurationError, require
from megatron_peft.config.untrusted import require_regular
from megatron_peft.data.preparation.document import Document


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
