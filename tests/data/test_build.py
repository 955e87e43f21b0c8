"""The data of a run from its configuration: how long it is, what each rank reads, what was left out of it."""

import logging
from dataclasses import replace
from itertools import islice
from typing import Any

import pytest

from megatron_peft.config import ConfigurationError, DataConfig, ParallelConfig, TrainingConfig
from megatron_peft.data.build import Data, build_data
from megatron_peft.data.tokenizers import NullTokenizer
from tests.checkpoint.runs import make_config
from tests.data.test_indexed import numbered_documents, write_indexed

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


def test_what_was_cut_is_said_once(write_lines, caplog):
    path = write_lines([{"prompt": "1", "completion": "2 " * 20}, *RECORDS])
    with caplog.at_level(logging.WARNING):
        build({"train_data_path": (path,)})
    told = "--train-data-path: 1 of 11 samples are longer than --seq-length 8 and were cut at their end"
    assert [record.getMessage() for record in caplog.records] == [f"{told} (first: {path}, line 1)."]


def test_indexed_data_keep_megatrons_order_while_they_last(tmp_path):
    prefix = write_indexed(tmp_path / "corpus", numbered_documents(200))
    data = build({"data_path": (prefix,), "split": "90,10"})
    dataset = data.train.dataset
    assert first_tokens(data.train, 5) == [int(dataset[i].tokens[0]) for i in range(20)]
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
