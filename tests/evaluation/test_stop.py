"""Texts that end an answer, however tokens cut them."""

from __future__ import annotations

import pytest

from megatron_peft.evaluation.stop import StopTexts


class Letters:
    """A character an id; 0 is a special token, written <end> and never shown."""

    special_tokens = {"<end>": 0}

    def encode(self, text):
        return list(map(ord, text))

    def decode(self, ids):
        return "".join(chr(i) for i in ids if i)


def _stop(*texts):
    return StopTexts(Letters(), texts)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "ends"), [("", False), ("a b", False), ("a\n\nb", True), ("\n\n", True), ("a\n", False)]
)
def test_an_answer_ends_with_any_of_the_texts(text, ends):
    assert _stop("###", "\n\n").is_complete(Letters().encode(text)) == ends


def test_only_the_end_of_a_long_answer_is_looked_at():
    stop = _stop("END")
    assert stop.is_complete(Letters().encode("x" * 500 + "END"))
    assert not stop.is_complete(Letters().encode("END" + "x" * 500)), "it would have ended long before"


def test_an_answer_is_cut_at_the_first():
    assert _stop("###", "Q:").cut("an answer Q: and ### more Q:") == "an answer "
    assert _stop().cut("all") == "all" and not _stop().is_complete([65])


def test_a_special_token_ends_by_its_id():
    stop = _stop("<end>", "\n")
    assert stop.end_ids == {0} and stop.texts == ["\n"]


def test_an_empty_text_ends_nothing():
    assert not _stop("").is_complete([65]) and _stop("").cut("a") == "a"
