"""When two texts are one item."""

from __future__ import annotations

import pytest

from megatron_peft.data.preparation.document import normalised


@pytest.mark.parametrize(
    ("text", "other"),
    [
        ("The cat sat.", "the  CAT\nsat"),
        ("It's 3.50 €", "it s 3 50"),
        ("ﬁne ① word", "fine 1 word"),
        ("Straße", "STRASSE"),
        ("L'été", "l’été"),
    ],
)
def test_case_punctuation_spaces_and_forms_do_not_count(text: str, other: str) -> None:
    assert normalised(text) == normalised(other)


@pytest.mark.parametrize(("text", "other"), [("3 apples", "4 apples"), ("été", "ete"), ("not good", "good")])
def test_words_numbers_and_accents_count(text: str, other: str) -> None:
    assert normalised(text) != normalised(other)
