"""English-French messages of two programs, as prompts and completions.

The catalogs lie in the wheels of Django and of JupyterLab's French language pack. A message is kept when its English
has at least two words and its French differs from it. Messages that say the same but for case, punctuation or
placeholders fall on the same side of the split, so that nothing held out was seen in training.
"""

import fnmatch
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile, ZipFile

from megatron_peft.config import ConfigurationError
from megatron_peft.config.untrusted import parse_json, read_text
from megatron_peft.demo.downloads import fetch_wheel
from megatron_peft.demo.gettext_catalog import read_messages

# package -> the catalogs in its wheel
SOURCES = {
    "django": "*/locale/fr/LC_MESSAGES/*.mo",
    "jupyterlab-language-pack-fr-FR": "*/locale/fr_FR/LC_MESSAGES/*.mo",
}
HELD_OUT_OF = 18  # one group of messages in so many is held out
PLACEHOLDER = re.compile(r"%\(\w+\)[a-z]|%[a-z]\b|%\d+|\{[^}]*\}|<[^>]*>|https?://\S+")
WORD = re.compile(r"[^\W\d_]+")


@dataclass(frozen=True)
class Pair:
    """A message and its translation, each on one line."""

    english: str
    french: str

    @property
    def prompt(self) -> str:
        return f"English: {self.english}\nFrench:"

    def as_record(self) -> dict[str, str]:
        return {"prompt": self.prompt, "completion": f" {self.french}"}


@dataclass(frozen=True)
class PairFiles:
    """The two JSON-lines files of `prepare_pairs`."""

    train: Path
    valid: Path


def prepare_pairs(folder: Path, downloads: Path) -> PairFiles:
    """Write train.jsonl and valid.jsonl into `folder`; what is already there is kept."""
    files = PairFiles(folder / "train.jsonl", folder / "valid.jsonl")
    if files.train.exists() and files.valid.exists():
        return files
    folder.mkdir(parents=True, exist_ok=True)
    wheels = [(fetch_wheel(package, downloads), pattern) for package, pattern in SOURCES.items()]
    pairs = distinct_pairs(message for wheel, pattern in wheels for message in _messages(wheel, pattern))
    _write_lines(files.train, (pair for pair in pairs if not is_held_out(pair)))
    _write_lines(files.valid, (pair for pair in pairs if is_held_out(pair)))
    return files


def read_pairs(path: Path) -> list[Pair]:
    """The pairs of a file that `prepare_pairs` wrote."""
    records = (parse_json(line, str(path)) for line in read_text(path).splitlines())
    return [
        Pair(record["prompt"].removeprefix("English: ").removesuffix("\nFrench:"), record["completion"].strip())
        for record in records
    ]


def distinct_pairs(messages: Iterable[tuple[str, str]]) -> list[Pair]:
    """The usable messages in their order, one for each English text (the first translation of several)."""
    pairs: dict[str, Pair] = {}
    for english, french in messages:
        pair = Pair(_clean(english), _clean(french))
        if _is_usable(pair):
            pairs.setdefault(pair.english, pair)
    return list(pairs.values())


def is_held_out(pair: Pair) -> bool:
    """Whether the pair is for scoring only: decided by a hash of the words of its English."""
    words = " ".join(_words(pair.english))
    return int.from_bytes(hashlib.sha256(words.encode()).digest()[:8], "big") % HELD_OUT_OF == 0


def _is_usable(pair: Pair) -> bool:
    """Two words at least, and translated: a French text with the same words is the English one left as it was."""
    words = _words(pair.english)
    return min(len(words), len(pair.english.split())) >= 2 and bool(pair.french) and words != _words(pair.french)


def _words(text: str) -> list[str]:
    """The words without placeholders, markup, digits and case."""
    return WORD.findall(PLACEHOLDER.sub(" ", text).casefold())


def _clean(text: str) -> str:
    """One line, plain spaces (French sets no-break ones before punctuation, by no common rule), plain apostrophes."""
    return " ".join(text.replace("\u2019", "'").split())


def _messages(wheel: Path, pattern: str) -> Iterator[tuple[str, str]]:
    try:
        with ZipFile(wheel) as archive:
            for name in sorted(fnmatch.filter(archive.namelist(), pattern)):
                yield from read_messages(archive.read(name))
    except BadZipFile as error:
        raise ConfigurationError(f"{wheel} is damaged ({error}): remove it and start again.") from error


def _write_lines(path: Path, pairs: Iterable[Pair]) -> None:
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(pair.as_record(), ensure_ascii=False) + "\n" for pair in pairs)
    temporary.replace(path)
