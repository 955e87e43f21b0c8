"""The hash split, and test items recognised."""

from __future__ import annotations

from collections import Counter

import pytest

from megatron_peft.config_error import ConfigurationError
from megatron_peft.data.preparation.document import Document
from megatron_peft.data.preparation.split import HashSplit, TestItems


def item(*texts: str, fragments: tuple[str, ...] = ()) -> Document:
    return Document({}, texts, f"file, {texts[0]}", fragments)


def test_shares_are_those_asked_for() -> None:
    parts = Counter(HashSplit(10, 20).part(item(f"item {n}")) for n in range(20_000))
    assert parts["test"] == pytest.approx(4000, rel=0.1)
    assert parts["valid"] == pytest.approx(2000, rel=0.1)


def test_part_depends_on_text_and_seed_only() -> None:
    texts = [f"Item {n}." for n in range(300)]
    parts = [HashSplit(30).part(item(text)) for text in texts]
    assert parts == [HashSplit(30).part(item(text.upper() + "!")) for text in texts]
    assert parts != [HashSplit(30, seed=1).part(item(text)) for text in texts]


def test_more_test_items_take_none_from_another_part_twice() -> None:
    """valid moves behind test; an item of test stays in test when its share grows."""
    small, large = HashSplit(5, 5), HashSplit(5, 10)
    items = [item(f"{n}") for n in range(2000)]
    assert all(large.part(one) == "test" for one in items if small.part(one) == "test")


def test_shares_must_leave_something() -> None:
    with pytest.raises(ConfigurationError, match="--valid-percent 50 and --test-percent 50 leave nothing"):
        HashSplit(50, 50)
    with pytest.raises(ConfigurationError, match="--valid-percent is -1"):
        HashSplit(-1)


def test_test_items_are_recognised_by_any_text() -> None:
    tests = TestItems()
    tests.add(item("How many apples?", "an answer"))
    assert tests.match(item("how many APPLES")) == "file, How many apples?"
    assert tests.match(item("other", "An answer!")) is not None
    assert tests.match(item("How many pears?")) is None
    assert tests.match(item("how many apples are there")) is None, "only fragments may stand inside"


def test_fragments_are_found_inside_unless_short() -> None:
    tests = TestItems()
    long = "return the sum of all the even numbers in the list"
    tests.add(item("prompt", fragments=(long, "return x")))
    assert tests.match(item("please: " + long.replace(" ", "\n") + ", quickly")) is not None
    assert tests.match(item("def f(x): return x")) is None


def test_empty_texts_match_nothing() -> None:
    tests = TestItems()
    tests.add(item("...", fragments=("",)))
    assert tests.match(item("!!!")) is None
