"""Which part an item falls into, and whether it is one of the test items."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_peft.config import Requirements
from megatron_peft.data.preparation.document import Document, normalised

PARTS_OF = 10_000  # a share is counted in hundredths of a percent
FRAGMENT_WORDS = 8  # a shorter text may appear anywhere


@dataclass(frozen=True)
class HashSplit:
    """Train, valid or test by a hash of an item's normalised text and the seed.

    An item is in the same part whatever stands around it, and so are all items with its text.
    """

    valid_percent: float = 5.0
    test_percent: float = 0.0
    seed: int = 1234

    def __post_init__(self) -> None:
        with Requirements(self) as unmet:
            unmet.not_negative("valid_percent", "test_percent")
            unmet(
                self.valid_percent + self.test_percent < 100,
                f"--valid-percent {self.valid_percent:g} and --test-percent {self.test_percent:g} leave nothing to "
                "train on: their sum must be below 100.",
            )

    def part(self, document: Document) -> str:
        """'train', 'valid' or 'test'."""
        text = f"{self.seed}\n{normalised(document.texts[0])}"
        position = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % PARTS_OF
        test_end = self.test_percent / 100 * PARTS_OF
        valid_end = test_end + self.valid_percent / 100 * PARTS_OF
        return "test" if position < test_end else "valid" if position < valid_end else "train"


class TestItems:
    """The normalised texts of test items: all of them in memory."""

    __test__ = False  # no test of pytest's

    def __init__(self) -> None:
        self._places: dict[str, str] = {}
        self._fragments: dict[str, list[tuple[str, str]]] = {}  # by their first words: (fragment, place)

    def add(self, document: Document) -> None:
        for text in document.texts:
            self._places.setdefault(normalised(text), document.place)
        for text in map(normalised, document.fragments):
            if beginning := next(_windows(text), ""):
                self._fragments.setdefault(beginning, []).append((text, document.place))

    def match(self, document: Document) -> str | None:
        """The place of the test item that `document` is or holds, or None."""
        texts = [text for text in map(normalised, document.texts) if text]
        for text in texts:
            if text in self._places:
                return self._places[text]
        return next(filter(None, map(self._held_by, texts)), None)

    def _held_by(self, text: str) -> str | None:
        """The place of a test item of which a fragment stands in `text`."""
        if not self._fragments:
            return None
        found = (pair for window in _windows(text) for pair in self._fragments.get(window, ()))
        return next((place for fragment, place in found if f" {fragment} " in f" {text} "), None)


def _windows(text: str) -> Iterator[str]:
    """Every run of FRAGMENT_WORDS words; none of a shorter text."""
    words = text.split(" ")
    for start in range(len(words) - FRAGMENT_WORDS + 1):
        yield " ".join(words[start : start + FRAGMENT_WORDS])
