"""Sentence pairs for translation: two files line by line (WMT, OPUS's Moses format), or one with tabs."""

from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path

from megatron_peft.config import ConfigurationError, require
from megatron_peft.config.untrusted import require_regular
from megatron_peft.data.preparation.document import Document


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


def _lines(path: Path) -> Iterator[str]:
    require_regular(path)
    try:
        with path.open(encoding="utf-8-sig", newline="\n") as file:
            for line in file:
                yield line.rstrip("\r\n")
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{path} is not UTF-8: {error}.") from error
