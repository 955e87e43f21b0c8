from __future__ import annotations

import logging
from pathlib import Path

import pytest
from megatron.core.datasets.utils import Split

from megatron_peft.config import ConfigurationError, DataConfig, ParallelConfig
from megatron_peft.data.indexed import build_indexed
from megatron_peft.data.tokenizers import NullTokenizer
from megatron_peft.runtime.launch import start_world
from tests.data.indexed_corpus import numbered_documents, write_indexed
from tests.ranks import run_ranks

TOKENIZER = NullTokenizer(999)


def build(which: Split, num_samples: int | None, /, *paths: str, **settings):
    data = DataConfig(data_path=paths, seq_length=8, **settings)
    return build_indexed(data, which, paths, num_samples, TOKENIZER)


def tokens_seen(dataset) -> set[int]:
    return {int(token) for i in range(len(dataset)) for token in dataset[i].tokens}


@pytest.fixture
def corpus(tmp_path) -> str:
    return write_indexed(tmp_path / "corpus", numbered_documents(100))


def test_samples_are_seq_length_tokens_that_all_count(tmp_path):
    prefix = write_indexed(tmp_path / "count", [list(range(1, 26))])
    dataset = build(Split.train, None, prefix, split="1")
    assert len(dataset) == 3
    samples = sorted((dataset[i].tokens.tolist(), dataset[i].labels.tolist()) for i in range(3))
    assert samples == [(list(range(n, n + 8)), list(range(n + 1, n + 9))) for n in (1, 9, 17)]
    assert all(dataset[i].loss_mask.tolist() == [1.0] * 8 for i in range(3))


def test_split_cuts_documents(corpus):
    assert tokens_seen(build(Split.train, None, corpus, split="80,15,5")) <= set(range(80))
    assert tokens_seen(build(Split.valid, None, corpus, split="80,15,5")) - {0} <= set(range(80, 95))
    assert tokens_seen(build(Split.test, None, corpus, split="80,15,5")) <= set(range(95, 100))


def test_the_default_split_is_megatrons(corpus):
    assert tokens_seen(build(Split.valid, None, corpus)) - {0} <= {97, 98, 99}


def test_a_whole_validation_keeps_its_last_partial_sequence_masked(corpus):
    dataset = build(Split.valid, None, corpus, split="80,20")  # 100 tokens: 99 to predict
    assert len(dataset) == 13
    assert sum(dataset[i].loss_mask.sum() for i in range(13)) == 99


def test_a_dataset_repeats_for_as_many_samples_as_are_asked_for(corpus):
    assert len(build(Split.train, 1000, corpus, split="80,20")) >= 1000


def test_weights_blend(tmp_path):
    a = write_indexed(tmp_path / "a", numbered_documents(20))
    b = write_indexed(tmp_path / "b", numbered_documents(20, first=500))
    dataset = build(Split.train, 400, "0.25", a, "0.75", b, split="1")
    from_b = sum(int(dataset[i].tokens[0]) >= 500 for i in range(400))
    assert 295 <= from_b <= 305


def test_prefixes_without_weights_are_taken_once(tmp_path):
    a = write_indexed(tmp_path / "a", numbered_documents(20))
    b = write_indexed(tmp_path / "b", numbered_documents(40, first=500))
    dataset = build(Split.train, None, a, b, split="1")
    assert len(dataset) == (100 - 1) // 8 + (200 - 1) // 8


def test_an_evaluation_of_a_weighted_blend_takes_each_once(tmp_path):
    a = write_indexed(tmp_path / "a", numbered_documents(20))
    b = write_indexed(tmp_path / "b", numbered_documents(40, first=500))
    assert len(build(Split.valid, None, "1", a, "9", b, split="0,1")) == 13 + 25


def test_each_split_may_have_files_of_its_own(tmp_path):
    a = write_indexed(tmp_path / "a", numbered_documents(20))
    b = write_indexed(tmp_path / "b", numbered_documents(20, first=500))
    data = DataConfig(train_data_path=(a,), valid_data_path=(b,), seq_length=8)
    assert tokens_seen(build_indexed(data, Split.train, (a,), 10, TOKENIZER)) <= set(range(20))
    assert tokens_seen(build_indexed(data, Split.valid, (b,), None, TOKENIZER)) - {0} <= set(range(500, 520))


def test_indices_are_cached_where_the_flag_says(corpus, tmp_path):
    cache = tmp_path / "cache"
    build(Split.train, 10, corpus, data_cache_path=str(cache))
    assert len(list(cache.glob("*-GPTDataset-train-*.npy"))) == 3
    assert not Path(corpus).exists()  # megatron-core's default: a folder named after the prefix


def test_a_split_without_text_is_no_data_for_evaluation_and_an_error_for_training(tmp_path, caplog):
    prefix = write_indexed(tmp_path / "small", numbered_documents(4))
    with caplog.at_level(logging.WARNING):
        assert build(Split.test, None, prefix) is None
    assert "the test split has 0 tokens" in caplog.text
    with pytest.raises(ConfigurationError, match="the train split has 0 tokens of .*small and needs 2; give --split"):
        build(Split.train, 10, prefix, split="0,1")
    with pytest.raises(ConfigurationError, match="the train split has 5 tokens of .*small and needs 9"):
        build(Split.train, None, prefix, split="1,3")


def test_epochs_of_a_weighted_blend_are_refused(corpus):
    with pytest.raises(ConfigurationError, match="--data-path has weights, and an epoch .* give --train-iters"):
        build(Split.train, None, "1", corpus)


def test_a_cache_that_cannot_be_written_is_named(corpus, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="indices of the train data cannot be written .* --data-cache-path"):
        build(Split.train, 10, corpus, data_cache_path=str(tmp_path / "file"))


def test_a_cached_blend_needs_torch_distributed(corpus, tmp_path):
    with pytest.raises(ConfigurationError, match="--data-cache-path with a blend"):
        build(Split.train, 10, corpus, corpus, data_cache_path=str(tmp_path))


def tokens_on_a_rank(blend: tuple[str, str, str]) -> list[list[int]]:
    start_world(ParallelConfig())
    a, b, cache = blend
    dataset = build(Split.train, 60, "1", a, "2", b, split="1", data_cache_path=cache)
    return [dataset[i].tokens.tolist() for i in range(60)]


def test_all_ranks_see_the_same_blend(tmp_path):
    a = write_indexed(tmp_path / "a", numbered_documents(20))
    b = write_indexed(tmp_path / "b", numbered_documents(20, first=500))
    seen = run_ranks(2, tokens_on_a_rank, (a, b, str(tmp_path / "cache")))
    alone = build(Split.train, 60, "1", a, "2", b, split="1")
    assert seen[0] == seen[1] == [alone[i].tokens.tolist() for i in range(60)]
