"""The data of a run from its configuration: how long it is, what each rank reads, what is left out; indexed data."""

import logging
import os
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from megatron.core.datasets.utils import Split

from megatron_peft.config import ConfigurationError, DataConfig, ParallelConfig, TrainingConfig
from megatron_peft.data import build as build_module
from megatron_peft.data.build import Data, build_data, build_indexed, build_mock, checked_blend
from megatron_peft.data.tokenizers import NullTokenizer
from megatron_peft.runtime.launch import start_world
from tests.checkpoint.runs import make_config
from tests.one_rank import one_rank
from tests.ranks import run_ranks

RECORDS = [{"prompt": str(i), "completion": f"{i} {i}"} for i in range(10)]  # 3 positions each


def build(data: dict[str, Any], consumed: int = 0, **training) -> Data:
    """`data`, `training`: fields of the configuration; without a length the run has 5 iterations."""
    length = {} if {"train_iters", "train_samples", "train_epochs"} & training.keys() else {"train_iters": 5}
    settings = DataConfig(**{"num_workers": 0, "seq_length": 8, **data})
    steps = TrainingConfig(**{"global_batch_size": 4, **length, **training})
    config = replace(make_config(), parallel=ParallelConfig(), data=settings, training=steps)
    built = build_data(config, NullTokenizer(999), data_parallel_rank=0, data_parallel_size=1, num_ids=1000)
    built.train.consumed_samples = consumed
    return built


@pytest.fixture
def train(write_lines) -> dict[str, Any]:
    return {"train_data_path": (write_lines(RECORDS, "train.jsonl"),)}


@pytest.fixture
def both(train, write_lines) -> dict[str, Any]:
    return {**train, "valid_data_path": (write_lines(RECORDS[:6], "valid.jsonl"),)}


@pytest.fixture
def few_and_many(write_lines) -> tuple[str, str]:
    """A file of one record, 500, and one of ten."""
    few = write_lines([{"prompt": "500", "completion": " 1"}], "few.jsonl")
    return few, write_lines(RECORDS, "many.jsonl")


def first_tokens(batches, steps: int | None = None) -> list[int]:
    return [int(row[0]) for step in islice(batches, steps) for batch in step for row in batch.tokens]


def test_training_is_shuffled_and_continues_where_it_was(train):
    straight = first_tokens(build(train).train, 5)
    assert sorted(straight[:10]) == list(range(10)) != straight[:10]
    assert first_tokens(build(train, consumed=8).train, 3) == straight[8:]
    with pytest.raises(ConfigurationError, match="--train-samples 3 is less than one --global-batch-size 4"):
        build(train, train_samples=3)


def test_validation_is_one_pass_in_file_order_that_eval_iters_end_and_none_mean_no_evaluation(both):
    data = build(both)
    assert data.valid is not None and data.test is None
    assert first_tokens(data.valid)[:6] == list(range(6)) and data.valid.num_steps == 2
    data = build({**both, "test_data_path": both["valid_data_path"]}, eval_iters=1)
    assert data.valid and data.test and first_tokens(data.valid) == first_tokens(data.test) == [0, 1, 2, 3]
    assert build(both, eval_iters=0).valid is build(both, eval_interval=None).valid is None


def test_generated_data_are_validated_with_ten_batches_unless_eval_iters_says_otherwise():
    for asked, steps in (({}, 10), ({"eval_iters": 12}, 12)):
        data = build({"mock_data": True, "seq_length": 4096}, **asked)
        assert data.valid and data.test and data.valid.num_steps == data.test.num_steps == steps


@pytest.mark.parametrize(
    ("length", "iterations"),
    [({"train_iters": 7}, 7), ({"train_samples": 11}, 2)]
    + [({"train_epochs": epochs}, iterations) for epochs, iterations in ((0.1, 1), (0.5, 2), (1, 3), (1.5, 4), (2, 5))],
)
def test_the_length_of_the_run_becomes_iterations(train, length, iterations):
    assert build(train, **length).train_iters == iterations


def test_packing_packs_whatever_is_json_and_first_fit_decreasing_is_the_default(both, write_lines):
    data = build({**both, "pack_sequences": True, "packing": "next-fit"})
    batch = next(iter(data.train))[0]
    assert batch.cu_seqlens is not None and batch.cu_seqlens.tolist() == [0, 3, 6]  # 2 of 3 positions fit in 8
    assert data.train.order.epoch_length(0) == 5
    assert data.valid is not None and sum(b.num_samples for step in data.valid for b in step) == 6
    records = [{"text": " 1" * length} for length in (6, 2) * 8]
    packed = {"train_data_path": (write_lines(records),), "pack_sequences": True}
    full, before = (build(packed | choice).train for choice in ({}, {"packing": "next-fit"}))
    assert full.order.epoch_length(0) == 8 < before.order.epoch_length(0)
    assert {batch.tokens.shape[1] for step in islice(full, 2) for batch in step} == {8}


def test_weights_before_json_files_are_shares_of_the_samples(few_and_many):
    few, many = few_and_many
    data = build({"train_data_path": ("0.25", few, "0.75", many)}, train_iters=10)
    tokens = first_tokens(data.train, 10)
    assert tokens.count(500) == 10 and sorted(set(tokens)) == [*range(10), 500]
    assert first_tokens(build({"train_data_path": ("1", few, "3", many)}, consumed=20).train, 5) == tokens[20:]
    assert len(first_tokens(build({"train_data_path": (few, many)}, train_epochs=1).train, 2)) == 8
    with pytest.raises(ConfigurationError, match="--train-data-path has weights, and --train-epochs is undefined"):
        build({"train_data_path": ("0.25", few, "0.75", many)}, train_epochs=1)


def test_weights_of_validation_hold_as_far_as_eval_iters_reach_and_one_pass_has_none(train, few_and_many):
    blended = {**train, "valid_data_path": ("1", few_and_many[0], "1", few_and_many[1])}
    cut, whole = build(blended, eval_iters=2).valid, build(blended).valid
    assert cut and whole and first_tokens(cut).count(500) == 4 and first_tokens(whole).count(500) == 1


def test_bad_data_are_told_with_the_flag_or_the_file_that_brought_them(train, write_lines):
    with pytest.raises(ConfigurationError, match="--valid-data-path .*empty.jsonl is empty"):
        build({**train, "valid_data_path": (write_lines([], "empty.jsonl"),)})
    long, good = write_lines([{"prompt": "1 " * 20, "completion": "2"}], "long.jsonl"), write_lines(RECORDS)
    with pytest.raises(ConfigurationError, match="all samples of .*long.jsonl were skipped, so the blend's weights"):
        build({"train_data_path": ("1", good, "1", long)})


def test_columns_that_flags_name_reach_the_data(write_lines):
    path = write_lines([{"prompt": "1", "completion": "2", "q": "3 4", "a": "5"}] * 4)
    batches = build({"train_data_path": (path,), "prompt_column": "q", "response_column": "a"}).train
    assert first_tokens(batches, 1) == [3] * 4


def test_what_was_cut_is_said_once(write_lines, caplog):
    path = write_lines([{"prompt": "1", "completion": "2 " * 20}, *RECORDS])
    with caplog.at_level(logging.WARNING):
        build({"train_data_path": (path,)})
    told = "--train-data-path: 1 of 11 samples are longer than --seq-length 8 (21 would hold all) and were cut"
    assert [record.getMessage() for record in caplog.records] == [f"{told} at their end (first: {path}, line 1)."]


def test_indexed_data_keep_megatrons_order_while_they_last(tmp_path):
    prefix = write_indexed(tmp_path / "corpus", numbered_documents(200))
    data = build({"data_path": (prefix,), "split": "90,10"})
    dataset = data.train.dataset
    assert first_tokens(data.train, 5) == [int(dataset[i].tokens[0]) for i in range(20)]
    assert data.longest_sample == len(dataset[0]) == 8
    assert data.valid is not None and first_tokens(data.valid)[0] >= 0 and data.test is None


def test_indexed_data_are_shuffled_again_each_epoch_and_weighted_have_none(tmp_path):
    prefix = write_indexed(tmp_path / "corpus", numbered_documents(100))
    with pytest.raises(ConfigurationError, match="--data-path has weights, and --train-epochs is undefined"):
        build({"data_path": ("1", prefix), "split": "1"}, train_epochs=2)
    train = build({"data_path": (prefix,), "split": "1"}, train_epochs=2).train
    per_epoch = train.order.epoch_length(0)
    assert per_epoch == (500 - 1) // 8
    seen = first_tokens(train, -(-2 * per_epoch // 4))
    first, second = seen[:per_epoch], seen[per_epoch : 2 * per_epoch]
    assert first != second and sorted(first) == sorted(second)


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


def built_split(which: Split, num_samples: int | None, /, *paths: str, **settings):
    data = DataConfig(data_path=paths, seq_length=8, **settings)
    return build_indexed(data, which, num_samples, TOKENIZER, NUM_IDS)


def tokens_seen(dataset) -> set[int]:
    return {int(token) for i in range(len(dataset)) for token in dataset[i].tokens}


@pytest.fixture
def corpus(tmp_path) -> str:
    return write_indexed(tmp_path / "corpus", numbered_documents(100))


@pytest.fixture(scope="module")
def world() -> Iterator[None]:
    with one_rank(with_groups=False):
        yield


@pytest.fixture
def two(tmp_path, world) -> tuple[str, str]:
    """20 documents of the tokens 0 to 19, and 40 of 500 to 539."""
    a, b = numbered_documents(20), numbered_documents(40, first=500)
    return write_indexed(tmp_path / "a", a), write_indexed(tmp_path / "b", b)


def test_samples_are_seq_length_tokens_that_all_count_mapped_or_not(tmp_path):
    prefix = write_indexed(tmp_path / "count", [list(range(1, 26))])
    for mapped in (True, False):
        dataset = built_split(Split.train, None, prefix, split="1", mmap_bin_files=mapped)
        assert len(dataset) == 3
        samples = sorted((dataset[i].tokens.tolist(), dataset[i].labels.tolist()) for i in range(3))
        assert samples == [(list(range(n, n + 8)), list(range(n + 1, n + 9))) for n in (1, 9, 17)]
        assert all(dataset[i].loss_mask.tolist() == [1.0] * 8 for i in range(3))


def test_split_cuts_documents(corpus):
    """A corpus of fewer tokens than a sequence is padded with 0."""
    for which, documents in ((Split.train, range(80)), (Split.valid, range(80, 95)), (Split.test, range(95, 100))):
        assert tokens_seen(built_split(which, None, corpus, split="80,15,5")) - {0} <= set(documents)
    assert tokens_seen(built_split(Split.valid, None, corpus)) - {0} <= {97, 98, 99}, "Megatron's default"
    whole = built_split(Split.valid, None, corpus, split="80,20")  # 100 tokens: 99 to predict, the last few masked
    assert len(whole) == 13
    assert sum(whole[i].loss_mask.sum() for i in range(13)) == 99


def test_weights_blend_and_without_them_or_in_an_evaluation_each_is_taken_once(two):
    dataset = built_split(Split.train, 400, "0.25", two[0], "0.75", two[1], split="1")
    assert 295 <= sum(int(dataset[i].tokens[0]) >= 500 for i in range(400)) <= 305
    assert len(built_split(Split.train, None, *two, split="1")) == (100 - 1) // 8 + (200 - 1) // 8
    assert len(built_split(Split.valid, None, "1", two[0], "9", two[1], split="0,1")) == 13 + 25


def test_each_split_may_have_files_of_its_own(two):
    data = DataConfig(train_data_path=two[:1], valid_data_path=two[1:], seq_length=8)
    assert tokens_seen(build_indexed(data, Split.train, 10, TOKENIZER, NUM_IDS)) <= set(range(20))
    valid = build_indexed(data, Split.valid, None, TOKENIZER, NUM_IDS)
    assert tokens_seen(valid) - {0} <= set(range(500, 540))


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("ran",)


@pytest.mark.parametrize("has_flag", [False, True])
def test_a_pickle_among_the_cached_indices_is_never_read(corpus, tmp_path, monkeypatch, has_flag):
    monkeypatch.chdir(tmp_path)
    choice = {"data_cache_path": str(tmp_path / "cache")} if has_flag else {}
    built_split(Split.train, 10, corpus, **choice)
    built = tmp_path / "cache" if has_flag else tmp_path / "cache" / "GPTDataset_indices"
    assert len(list(built.glob("*.npy"))) == 3 and not Path(corpus).exists(), "no folder that is named as the data"
    for path in tmp_path.rglob("*shuffle_index.npy"):
        path.write_bytes(pickle.dumps(Harmful()))
    with pytest.raises(ConfigurationError, match="shuffle_index.npy is not an array of numpy's: remove it"):
        dataset = built_split(Split.train, 10, corpus, **choice)
        assert dataset is not None and dataset[0]
    assert not (tmp_path / "ran").exists()


def test_a_split_without_text_is_no_data_for_evaluation_and_an_error_for_training(tmp_path, caplog, monkeypatch):
    prefix = write_indexed(tmp_path / "small", numbered_documents(4))
    with caplog.at_level(logging.WARNING):
        for rank in (1, 0, 2):
            monkeypatch.setattr(build_module, "place_in_world", lambda rank=rank: (rank, 3))
            assert built_split(Split.test, None, prefix) is None
    assert caplog.text.count("the test split has 0 tokens") == 1, "only rank 0 warns"
    with pytest.raises(ConfigurationError, match="the train split has 0 tokens of .*small and needs 2; give --split"):
        built_split(Split.train, 10, prefix, split="0,1")
    with pytest.raises(ConfigurationError, match="the train split has 5 tokens of .*small and needs 9"):
        built_split(Split.train, None, prefix, split="1,3")


def test_what_cannot_be_built_is_named(corpus, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="indices of the train data cannot be written .* --data-cache-path"):
        built_split(Split.train, 10, corpus, data_cache_path=str(tmp_path / "file"))


def tokens_on_a_rank(blend: tuple[str, str, str]) -> list[list[int]]:
    start_world()
    a, b, cache = blend
    dataset = built_split(Split.train, 60, "1", a, "2", b, split="1", data_cache_path=cache)
    return [dataset[i].tokens.tolist() for i in range(60)]


def test_all_ranks_see_the_same_blend(two, tmp_path):
    a, b = two
    seen = run_ranks(2, tokens_on_a_rank, (a, b, str(tmp_path / "cache")))
    alone = built_split(Split.train, 60, "1", a, "2", b, split="1")
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
        built_split(Split.train, 1, two[0])


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
        built_split(Split.train, None, prefix, split="1")


@pytest.mark.parametrize("is_blend", [False, True])
def test_an_id_beyond_what_was_scanned_is_refused_when_it_is_read(corpus, two, monkeypatch, is_blend):
    monkeypatch.setattr(build_module, "READ_BEFORE", 1)
    paths = ("1", two[0], "1", corpus) if is_blend else (corpus,)
    data = DataConfig(data_path=paths, seq_length=8, split="1")
    dataset = build_indexed(data, Split.train, 200 if is_blend else None, TOKENIZER, num_ids=99)
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
