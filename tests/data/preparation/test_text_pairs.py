"""Sentence pairs from two files or one, and what is wrong with them."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_peft.config_error import ConfigurationError
from megatron_peft.data.preparation.text_pairs import read_text_pairs


def read(tmp_path: Path, *texts: str) -> list[tuple[str, str]]:
    paths = [tmp_path / f"{n}.txt" for n in range(len(texts))]
    for path, text in zip(paths, texts, strict=True):
        path.write_bytes(text.encode())
    return [(d.fields["source"], d.fields["target"]) for d in read_text_pairs(paths, "English", "French")]


def test_line_n_translates_line_n(tmp_path: Path) -> None:
    assert read(tmp_path, "One.\r\nTwo.\n", "Un.\nDeux.") == [("One.", "Un."), ("Two.", "Deux.")]


def test_tabs_separate_in_one_file(tmp_path: Path) -> None:
    assert read(tmp_path, "One.\tUn.\nTwo.\tDeux.\n") == [("One.", "Un."), ("Two.", "Deux.")]


def test_only_line_feeds_end_lines(tmp_path: Path) -> None:
    """Line separators inside a sentence are in public corpora; they must not shift the lines."""
    assert read(tmp_path, "a\u2028b\nc\n", "x\ny\n") == [("a\u2028b", "x"), ("c", "y")]


def test_pairs_with_an_empty_side_are_left_out(tmp_path: Path) -> None:
    assert read(tmp_path, "One.\n \nThree.\n", "Un.\nDeux.\nTrois.\n") == [("One.", "Un."), ("Three.", "Trois.")]


def test_files_of_different_length_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"1\.txt ends after line 1, .*0\.txt goes on"):
        read(tmp_path, "One.\nTwo.\n", "Un.\n")


def test_line_without_one_tab_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"0\.txt, line 2: 3 columns; expected 2"):
        read(tmp_path, "a\tb\nc\td\te\n")


def test_three_files_are_no_pairs(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="3 files are no sentence pairs"):
        read(tmp_path, "a\n", "b\n", "c\n")


def test_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="cannot be read"):
        list(read_text_pairs([tmp_path / "none"], "English", "French"))
