"""One item of a benchmark, as its files hold it."""

import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Document:
    """What templates are filled from, and by which texts the item is recognised.

    Args:
        fields: as the task's template names them.
        texts: what makes the item that item (question, source sentence); one that is equal to one of a test item's,
            but for case, punctuation and spaces, is that test item. The first one decides the split.
        place: FILE, line N.
        fragments: texts that may not appear inside another item's either (a solution, say).
    """

    fields: Mapping[str, Any]
    texts: tuple[str, ...]
    place: str
    fragments: tuple[str, ...] = ()


def normalised(text: str) -> str:
    """The words of `text`: compatible characters made one, case folded, punctuation and spaces dropped."""
    return " ".join(WORD.findall(unicodedata.normalize("NFKC", text).casefold()))
