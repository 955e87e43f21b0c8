"""Megatron's indexed datasets: which prefixes are taken with which weights, split, blended, repeated and cached."""

import logging
import os
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from megatron.core.datasets.utils import Split

from megatron_peft.config import ConfigurationError, DataConfig
from megatron_peft.data import build as build_module
from megatron_peft.data.build import build_indexed, build_mock, checked_blend
from megatron_peft.data.tokenizers import NullTokenizer
from megatron_peft.runtime.launch import start_world
from tests.ranks import run_ranks

TOKENIZER, NUM_IDS = NullTokenizer(999), 1000


def write_indexed(prefix: Path, documents: Sequence[Sequence[int]], dtype: type = np.uint16) -> str:
    """An indexed dataset of these documents; returns its prefix."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for document in documents:
        builder.add_document(np.asarray(document), [len(document)])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def numbered_documents(num_documents: int, length: int = 5, first: int = 0) -> list[list[int]]:
    """Document i is `length` times the token `first + i`."""
    return [[first + i] * length for i in range(num_documents)]


def build(which: Split, num_samples: int | None, /, *paths: str, **settings):
    data = DataConfig(data_path=paths, seq_length=8, **settings)
    return build_indexed(data, which, paths, num_samples, TOKENIZER, NUM_IDS)


def tokens_seen(dataset) -> set[int]:
    return {int(token) for i in range(len(dataset)) for token in dataset[i].tokens}


@pytest.fixture
def corpus(tmp_path) -> str:
    return write_indexed(tmp_path / "corpus", numbered_documents(100))


@pytest.fixture
def two(tmp_path) -> tuple[str, str]:
    """20 documents of the tokens 0 to 19, and 40 of 500 to 539."""
    a, b = numbered_documents(20), numbered_documents(40, first=500)
    return write_indexed(tmp_path / "a", a), write_indexed(tmp_path / "b", b)


def test_samples_are_seq_length_tokens_that_all_count_mapped_or_not(tmp_path):
    prefix = write_indexed(tmp_path / "count", [list(range(1, 26))])
    for mapped in (True, False):
        dataset = build(Split.train, None, prefix, split="1", mmap_bin_files=mapped)
        assert len(dataset) == 3
        samples = sorted((dataset[i].tokens.tolist(), dataset[i].labels.tolist()) for i in range(3))
        assert samples == [(list(range(n, n + 8)), list(range(n + 1, n + 9))) for n in (1, 9, 17)]
        assert all(dataset[i].loss_mask.tolist() == [1.0] * 8 for i in range(3))


def test_split_cuts_documents(corpus):
    """A corpus of fewer tokens than a sequence is padded with 0."""
    for which, documents in ((Split.train, range(80)), (Split.valid, range(80, 95)), (Split.test, range(95, 100))):
        assert tokens_seen(build(which, None, corpus, split="80,15,5")) - {0} <= set(documents)
    assert tokens_seen(build(Split.valid, None, corpus)) - {0} <= {97, 98, 99}, "Megatron's default"
    whole = build(Split.valid, None, corpus, split="80,20")  # 100 tokens: 99 to predict, the last few masked
    assert len(whole) == 13
    assert sum(whole[i].loss_mask.sum() for i in range(13)) == 99


def test_weights_blend_and_without_them_or_in_an_evaluation_each_is_taken_once(two):
    dataset = build(Split.train, 400, "0.25", two[0], "0.75", two[1], split="1")
    assert 295 <= sum(int(dataset[i].tokens[0]) >= 500 for i in range(400)) <= 305
    assert len(build(Split.train, None, *two, split="1")) == (100 - 1) // 8 + (200 - 1) // 8
    assert len(build(Split.valid, None, "1", two[0], "9", two[1], split="0,1")) == 13 + 25


def test_each_split_may_have_files_of_its_own(two):
    data = DataConfig(train_data_path=two[:1], valid_data_path=two[1:], seq_length=8)
    assert tokens_seen(build_indexed(data, Split.train, two[:1], 10, TOKENIZER, NUM_IDS)) <= set(range(20))
    valid = build_indexed(data, Split.valid, two[1:], None, TOKENIZER, NUM_IDS)
    assert tokens_seen(valid) - {0} <= set(range(500, 540))


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("ran",)


@pytest.mark.parametrize("has_flag", [False, True])
def test_a_pickle_among_the_cached_indices_is_never_read(corpus, tmp_path, monkeypatch, has_flag):
    monkeypatch.chdir(tmp_path)
    choice = {"data_cache_path": str(tmp_path / "cache")} if has_flag else {}
    build(Split.train, 10, corpus, **choice)
    # megatron-core's default is a folder named after the prefix.
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 3 * has_flag and Path(corpus).exists() is not has_flag
    for path in tmp_path.rglob("*shuffle_index.npy"):
        path.write_bytes(pickle.dumps(Harmful()))
    with pytest.raises(ConfigurationError, match="shuffle_index.npy is not an array of numpy's: remove it"):
        dataset = build(Split.train, 10, corpus, **choice)
        assert dataset is not None and dataset[0]
    assert not (tmp_path / "ran").exists()


def test_a_split_without_text_is_no_data_for_evaluation_and_an_error_for_training(tmp_path, caplog):
    prefix = write_indexed(tmp_path / "small", numbered_documents(4))
    with caplog.at_level(logging.WARNING):
        assert build(Split.test, None, prefix) is None
    assert "the test split has 0 tokens" in caplog.text
    with pytest.raises(ConfigurationError, match="the train split has 0 tokens of .*small and needs 2; give --split"):
        build(Split.train, 10, prefix, split="0,1")
    with pytest.raises(ConfigurationError, match="the train split has 5 tokens of .*small and needs 9"):
        build(Split.train, None, prefix, split="1,3")


def test_what_cannot_be_built_is_named(corpus, tmp_path):
    with pytest.raises(ConfigurationError, match="--data-cache-path with a blend"):  # without torch.distributed
        build(Split.train, 10, corpus, corpus, data_cache_path=str(tmp_path))
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="indices of the train data cannot be written .* --data-cache-path"):
        build(Split.train, 10, corpus, data_cache_path=str(tmp_path / "file"))


def tokens_on_a_rank(blend: tuple[str, str, str]) -> list[list[int]]:
    start_world()
    a, b, cache = blend
    dataset = build(Split.train, 60, "1", a, "2", b, split="1", data_cache_path=cache)
    return [dataset[i].tokens.tolist() for i in range(60)]


def test_all_ranks_see_the_same_blend(two, tmp_path):
    a, b = two
    seen = run_ranks(2, tokens_on_a_rank, (a, b, str(tmp_path / "cache")))
    alone = build(Split.train, 60, "1", a, "2", b, split="1")
    assert seen[0] == seen[1] == [alone[i].tokens.tolist() for i in range(60)]


@pytest.mark.parametrize("mixture", ["0.3 A B", "A 0.3", "0.3 0.7", "0.3", "A 1 B 2", "0 A 1 B"])
def test_weights_above_0_and_prefixes_must_alternate(two, mixture):
    paths = [{"A": two[0], "B": two[1]}.get(part, part) for part in mixture.split()]
    told = "a weight before each path .*above 0" if mixture[0] == "0" and mixture[1] == " " else "give paths only, or"
    with pytest.raises(ConfigurationError, match=f"--data-path .*{told}"):
        checked_blend(paths, "--data-path")


def replaced(make) -> Any:
    """Damage that leaves something else in place of the file."""
    return lambda path: (path.unlink(), make(path))


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("a.bin", Path.unlink, "--data-path .*a: .*a.bin not found. A prefix is a path with"),
        ("a.bin", replaced(os.mkfifo), "--data-path .*a.bin is a pipe or a device, not a file"),
        ("a.bin", replaced(os.mkdir), "--data-path .*a.bin is a folder, not a file"),
        ("a.bin", lambda path: os.truncate(path, 198), "a.bin has 198 bytes where its index expects 200; it is trunc"),
        ("a.idx", lambda path: os.truncate(path, 0), "a.idx is not an index of Megatron's, or it is truncated"),
        ("a.idx", lambda path: os.truncate(path, 60), "a.idx is not an index of Megatron's, or it is truncated"),
    ],
)
def test_files_that_are_missing_or_torn_or_no_files_are_named(two, tmp_path, name, damage, message):
    damage(tmp_path / name)
    with pytest.raises(ConfigurationError, match=message):
        build(Split.train, 1, two[0])


@pytest.mark.parametrize(
    ("documents", "number", "wrong"),
    [
        ([[1, 2, 3] * 20, [5, 1000] * 9], 2, 1000),
        ([[70_000] * 60], 1, 70_000),
        ([[4] * 9, [4] * 9, [7, -3, 8] * 4], 3, -3),
    ],
)
def test_token_ids_that_the_model_has_no_row_for_are_refused(documents, number, wrong, tmp_path):
    prefix = write_indexed(tmp_path / "other", documents, dtype=np.int32)
    told = f"other.bin, document {number} has the token id {wrong}, but .* has 1000 rows"
    with pytest.raises(ConfigurationError, match=told):
        build(Split.train, None, prefix, split="1")


@pytest.mark.parametrize("is_blend", [False, True])
def test_an_id_beyond_what_was_scanned_is_refused_when_it_is_read(corpus, two, monkeypatch, is_blend):
    monkeypatch.setattr(build_module, "READ_BEFORE", 1)
    paths = ("1", two[0], "1", corpus) if is_blend else (corpus,)
    data = DataConfig(data_path=paths, seq_length=8, split="1")
    dataset = build_indexed(data, Split.train, paths, 200 if is_blend else None, TOKENIZER, num_ids=99)
    told = "--data-path .*corpus.bin, document 100 has the token id 99, .* has 99 rows"
    with pytest.raises(ConfigurationError, match=told):
        list(dataset)


def test_generated_samples_count_through_the_models_ids():
    data = DataConfig(mock_data=True, seq_length=512, split="9,1,0")
    train = build_mock(data, Split.train, 4, num_ids=50)
    assert len(train) >= 4 and train.digest == "mock"
    for sample in (train[i] for i in range(4)):
        assert len(sample.tokens) == 512 and sample.tokens.max() < 50 and sample.loss_mask.all()
        assert (sample.labels[:-1] == sample.tokens[1:]).all()
        steps = np.diff(sample.tokens)
        assert ((steps == 1) | (sample.tokens[:-1] == 49) | (sample.tokens[1:] == 49)).all()
    test = build_mock(data, Split.test, 4, num_ids=50)  # whatever --split says, as in Megatron
    assert len(test) >= 4 and any((test[i].tokens != train[i].tokens).any() for i in range(4))
