from __future__ import annotations

import threading
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_peft.data.batches import BatchLayout, GlobalBatches, Step
from megatron_peft.data.order import SampleOrder
from megatron_peft.data.packing import PackedOrder
from megatron_peft.data.sample import Sample

SEQ_LENGTH = 9


class Numbered:
    """Sample i is `lengths[i]` tokens, all of them i; its last token alone counts."""

    def __init__(self, num_samples: int) -> None:
        self.lengths = np.random.RandomState(num_samples).randint(1, SEQ_LENGTH, num_samples)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Sample:
        ids = np.full(self.lengths[index], index, dtype=np.int64)
        return Sample(ids, ids, np.eye(1, len(ids), len(ids) - 1, dtype=np.float32)[0])


def source(num_samples: int, layout: BatchLayout, packed: bool = False, **settings) -> GlobalBatches:
    dataset = Numbered(num_samples)
    order = PackedOrder(dataset.lengths, SEQ_LENGTH, 7, True) if packed else SampleOrder(num_samples, 7, True)
    return GlobalBatches(dataset, order, layout, **settings)


def seen(step: Step) -> list[list[int]]:
    """Sample numbers of each microbatch: the labels that count."""
    return [batch.labels[batch.loss_mask.bool()].tolist() for batch in step]


def global_order(
    num_samples: int, dp: int, micro: int, per_rank: int, steps: int, packed: bool = False, consumed: int = 0
) -> list[list[int]]:
    """Samples of each step in their order over all ranks: microbatch after microbatch, rank after rank."""
    ranks = [
        source(
            num_samples,
            BatchLayout(dp * micro * per_rank, micro, rank, dp, pad_id=999),
            packed,
            consumed_samples=consumed,
        )
        for rank in range(dp)
    ]
    taken = [[seen(step) for step in islice(rank, steps)] for rank in ranks]
    return [[number for m in range(per_rank) for rank in taken for number in rank[step][m]] for step in range(steps)]


@settings(max_examples=40)
@given(
    num_samples=st.integers(1, 40), dp=st.integers(1, 4), micro=st.integers(1, 3), per_rank=st.integers(1, 3),
    packed=st.booleans(), consumed=st.integers(0, 50),
)  # fmt: skip
def test_a_global_batch_holds_the_same_samples_in_the_same_order_at_any_layout(
    num_samples, dp, micro, per_rank, packed, consumed
):
    size = dp * micro * per_rank
    alone = global_order(num_samples, 1, 1, size, 4, packed, consumed)
    assert global_order(num_samples, dp, micro, per_rank, 4, packed, consumed) == alone
    order = source(num_samples, BatchLayout(size, 1), packed).order
    expected = [number for p in range(consumed, consumed + 4 * size) for number in order.samples_at(p).tolist()]
    assert sum(alone, []) == expected


@settings(max_examples=30)
@given(num_samples=st.integers(1, 30), done=st.integers(0, 6), packed=st.booleans())
def test_a_resumed_run_gets_the_very_next_samples(num_samples, done, packed):
    layout = BatchLayout(4, 2)
    straight = source(num_samples, layout, packed)
    expected = [seen(step) for step in islice(straight, done + 3)][done:]
    interrupted = source(num_samples, layout, packed)
    list(islice(interrupted, done))
    assert interrupted.consumed_samples == done * 4
    resumed = source(num_samples, layout, packed, consumed_samples=interrupted.consumed_samples)
    assert [seen(step) for step in islice(resumed, 3)] == expected


def test_a_run_may_be_resumed_with_another_batch_size():
    first = sum(global_order(13, 1, 2, 2, 3), [])
    rest = sum(global_order(13, 2, 1, 3, 2, consumed=12), [])
    assert first + rest == sum(global_order(13, 1, 1, 1, 24), [])


def test_iterating_again_goes_on():
    batches = source(10, BatchLayout(2, 1))
    steps = [seen(next(iter(batches))) for _ in range(5)]
    assert sorted(number for step in steps for micro in step for number in micro) == list(range(10))


def test_nothing_is_dropped_and_nothing_comes_twice_within_an_epoch():
    stream = sum(global_order(10, 1, 1, 3, 10), [])
    assert [sorted(stream[i : i + 10]) for i in (0, 10, 20)] == [list(range(10))] * 3


@pytest.mark.parametrize("packed", [False, True])
def test_threads_that_build_ahead_change_nothing(packed):
    layout = BatchLayout(4, 2)
    plain = [seen(step) for step in islice(source(11, layout, packed), 8)]
    batches = source(11, layout, packed, prefetch=3)
    assert [seen(step) for step in islice(batches, 8)] == plain
    assert batches.consumed_samples == 32  # of what was handed out, not of what was built
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def test_what_a_thread_raises_arrives():
    batches = source(5, BatchLayout(1, 1), prefetch=2)
    batches.dataset = []
    with pytest.raises(IndexError):
        next(iter(batches))


@settings(max_examples=40)
@given(
    num_samples=st.integers(1, 20), dp=st.integers(1, 3), micro=st.integers(1, 2), per_rank=st.integers(1, 3),
    prefetch=st.integers(0, 1), packed=st.booleans(),
)  # fmt: skip
def test_an_evaluation_sees_every_sample_once_and_gives_each_rank_as_many_microbatches(
    num_samples, dp, micro, per_rank, prefetch, packed
):
    def evaluation(rank: int) -> GlobalBatches:
        batches = source(num_samples, BatchLayout(dp * micro * per_rank, micro, rank, dp), packed, prefetch=prefetch)
        batches.end = batches.samples_per_epoch
        return batches

    ranks = [evaluation(rank) for rank in range(dp)]
    steps = [[len(step) for step in batches] for batches in ranks]
    assert steps == [[per_rank] * (ranks[0].num_steps or 0)] * dp
    numbers = [number for batches in ranks for step in batches for micro in seen(step) for number in micro]
    assert sorted(numbers) == list(range(num_samples))
    assert sum(batch.num_samples for batches in ranks for step in batches for batch in step) == num_samples


def test_an_evaluation_begins_anew_each_time():
    batches = source(7, BatchLayout(3, 1), end=5)
    assert [seen(step) for step in batches] == [seen(step) for step in batches]
    assert batches.num_steps == 2 and batches.consumed_samples == 0


@pytest.mark.parametrize(("epochs", "iterations"), [(1, 4), (2, 7), (0.5, 2), (0.1, 1)])
def test_epochs_become_iterations(epochs, iterations):
    batches = source(10, BatchLayout(3, 1))
    assert batches.iterations_for_epochs(epochs) == iterations
    assert batches.samples_per_epoch == 10
    assert batches.epochs_at(15) == 1.5
