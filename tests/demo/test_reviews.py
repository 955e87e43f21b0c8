from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest

from megatron_peft.config import ConfigurationError
from megatron_peft.demo import reviews
from megatron_peft.demo.reviews import Review, distinct_reviews, is_tested, prepare_reviews

RATINGS = [(2.0 if i % 2 else -2.0, f"A film about the letter {chr(97 + i % 26)}, number {i}.") for i in range(400)]


def write_source(path: Path, lines: list[str]) -> Path:
    """A source distribution as vaderSentiment's: the ratings in an archive within the archive."""
    path.parent.mkdir(parents=True, exist_ok=True)
    inner = io.BytesIO()
    _write_archive(inner, reviews.RATINGS, "\n".join(lines).encode())
    with path.open("wb") as file:
        _write_archive(file, f"vaderSentiment-3.3.2/{reviews.INNER}", inner.getvalue())
    return path


def _write_archive(file, name: str, content: bytes) -> None:
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        entry = tarfile.TarInfo(name)
        entry.size = len(content)
        archive.addfile(entry, io.BytesIO(content))


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_training_tuning_and_scoring_share_no_sentence(tmp_path: Path) -> None:
    lines = [f"{i}\t{rating}\t{sentence}" for i, (rating, sentence) in enumerate(RATINGS)]
    write_source(tmp_path / "downloads" / "vaderSentiment-3.3.2.tar.gz", lines)
    prepare_reviews(tmp_path / "reviews", tmp_path / "downloads")
    trained, tuned = (records(tmp_path / "reviews" / name) for name in ("train.jsonl", "valid.jsonl"))
    scored = records(tmp_path / "reviews" / "glue_sst2.jsonl")
    sentences = [record["prompt"].partition("\n")[0] for record in trained + tuned]
    assert sorted(sentences + [record["sentence"] for record in scored]) == sorted(text for _, text in RATINGS)
    assert 0 < len(scored) < 40 and len(tuned) < 20
    labels = {sentence: rating > 0 for rating, sentence in RATINGS}
    assert all(labels[record["sentence"]] == bool(record["label"]) for record in scored)
    assert all(
        record["completion"] == (" positive" if labels[record["prompt"].partition("\n")[0]] else " negative")
        for record in trained
    )


def test_sentences_that_readers_were_unsure_of_are_left_out() -> None:
    ratings = [(0.9, "So so."), (-0.9, "Meh."), (1.0, "Good  fun."), (-1.0, "Dull."), (3.0, "good fun.")]
    assert distinct_reviews(ratings) == [Review("Good fun.", True), Review("Dull.", False)]


def test_case_does_not_change_the_side() -> None:
    assert all(is_tested(Review(text.upper(), True)) == is_tested(Review(text, False)) for _, text in RATINGS)


def test_an_archive_of_something_else_is_named(tmp_path: Path) -> None:
    source = write_source(tmp_path / "vaderSentiment-3.3.2.tar.gz", ["no ratings here"])
    with pytest.raises(ConfigurationError, match=r"vaderSentiment-3\.3\.2\.tar\.gz does not carry.*remove it"):
        list(reviews.read_ratings(source))
    source.write_bytes(b"not an archive")
    with pytest.raises(ConfigurationError, match="does not carry"):
        list(reviews.read_ratings(source))


def test_what_is_there_is_kept(tmp_path: Path) -> None:
    (tmp_path / "reviews").mkdir()
    prepare_reviews(tmp_path / "reviews", tmp_path / "no-downloads")
    assert not (tmp_path / "no-downloads").exists()
