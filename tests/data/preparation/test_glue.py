"""GLUE's TSV files, and what is wrong with them."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_peft.config_error import ConfigurationError
from megatron_peft.data.preparation.glue import GLUE_TASKS, read_glue

SAMPLES = Path(__file__).parents[3] / "examples" / "data" / "glue"
QQP = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n"


def read(text: str, tmp_path: Path, name: str = "qqp", skip_damaged: bool = False) -> list:
    path = tmp_path / "train.tsv"
    path.write_bytes(text.encode())
    return list(read_glue(GLUE_TASKS[name], path, skip_damaged))


def test_columns_are_found_by_name_and_labels_numbered() -> None:
    first = next(read_glue(GLUE_TASKS["mnli"], SAMPLES / "MNLI" / "dev_matched.tsv"))
    assert set(first.fields) == {"premise", "hypothesis", "label"}
    labels = [d.fields["label"] for d in read_glue(GLUE_TASKS["mnli"], SAMPLES / "MNLI" / "train.tsv")]
    assert set(labels) == {0, 1, 2}


@pytest.mark.parametrize("name", GLUE_TASKS)
def test_every_task_reads_its_samples(name: str) -> None:
    task = GLUE_TASKS[name]
    for file in ("train.tsv", *task.tests.values()):
        assert len(list(read_glue(task, SAMPLES / task.folder / file))) >= 6


def test_quotation_marks_are_text(tmp_path: Path) -> None:
    documents = read(QQP + '1\t2\t3\t"Why?\tHow "so"?\t1\r\n', tmp_path)
    assert documents[0].fields == {"question1": '"Why?', "question2": 'How "so"?', "label": 1}
    assert documents[0].place.endswith("train.tsv, line 2")


def test_missing_column_is_named_with_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"line 1: no column question2, is_duplicate; QQP has question1, "):
        read("id\tquestion1\n1\tWhy?\n", tmp_path)


def test_empty_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="this file nothing"):
        read("", tmp_path)


def test_wrong_label_is_named_with_line_column_and_labels(tmp_path: Path) -> None:
    message = r"train\.tsv, line 3, column is_duplicate: 'yes' is no label of QQP; expected 0 or 1"
    with pytest.raises(ConfigurationError, match=message):
        read(QQP + "1\t2\t3\ta\tb\t0\n1\t2\t3\ta\tb\tyes\n", tmp_path)


def test_short_line_is_an_error_or_left_out(tmp_path: Path) -> None:
    text = QQP + "1\t2\t3\ta\n2\t2\t3\ta\tb\t0\n"
    with pytest.raises(ConfigurationError, match=r"line 2: 4 columns, where the header has 6.*--skip-damaged"):
        read(text, tmp_path)
    assert len(read(text, tmp_path, skip_damaged=True)) == 1


def test_missing_or_foreign_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="cannot be read: No such file"):
        list(read_glue(GLUE_TASKS["qqp"], tmp_path / "none.tsv"))
    (tmp_path / "latin.tsv").write_bytes(b"\xe9\xe9\n")
    with pytest.raises(ConfigurationError, match="not UTF-8"):
        list(read_glue(GLUE_TASKS["qqp"], tmp_path / "latin.tsv"))
