"""Which samples each step of each rank reads: global batches over ranks, padded or packed."""

import math
import threading
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_peft.data.batches import BatchLayout, GlobalBatches, Step, pack, pad
from megatron_peft.data.samples import PackedOrder, Sample, SampleOrder, sample_from_ids

SEQ_LENGTH = 9
LAYOUT = st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))  # ranks, micro-batch size, micro-batches
PACKED = st.sampled_from(["", "next-fit", "first-fit-decreasing"])


class Numbered:
    """Sample i is `lengths[i]` tokens, all of them i; its last token alone counts."""

    def __init__(self, num_samples: int) -> None:
        self.lengths = np.random.RandomState(num_samples).randint(1, SEQ_LENGTH, num_samples)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Sample:
        ids = np.full(self.lengths[index], index, dtype=np.int64)
        return Sample(ids, ids, np.eye(1, len(ids), len(ids) - 1, dtype=np.float32)[0])


def source(num_samples: int, layout: BatchLayout, packed: str = "", **settings) -> GlobalBatches:
    dataset = Numbered(num_samples)
    order = SampleOrder(num_samples, 7, True)
    if packed:
        order = PackedOrder(order, dataset.lengths, SEQ_LENGTH, packed)
    return GlobalBatches(dataset, order, layout, **settings)


def seen(step: Step) -> list[list[int]]:
    """Sample numbers of each microbatch: the labels that count."""
    return [batch.labels[batch.loss_mask.bool()].tolist() for batch in step]


def global_order(num_samples: int, layout: tuple[int, int, int], packed: str, consumed: int) -> list[list[int]]:
    """Samples of each of four steps in their order over all ranks: microbatch after microbatch, rank after rank."""
    dp, micro, per_rank = layout
    layouts = [BatchLayout(dp * micro * per_rank, micro, rank, dp, pad_id=999) for rank in range(dp)]
    ranks = [source(num_samples, layout, packed, consumed_samples=consumed) for layout in layouts]
    taken = [[seen(step) for step in islice(rank, 4)] for rank in ranks]
    return [[number for m in range(per_rank) for rank in taken for number in rank[step][m]] for step in range(4)]


@settings(max_examples=25)
@given(num_samples=st.integers(1, 40), layout=LAYOUT, packed=PACKED, consumed=st.integers(0, 50))
def test_a_global_batch_holds_the_same_samples_in_the_same_order_at_any_layout(num_samples, layout, packed, consumed):
    """From wherever it goes on: a run may be resumed with other batches."""
    size = math.prod(layout)
    alone = global_order(num_samples, (1, 1, size), packed, consumed)
    assert global_order(num_samples, layout, packed, consumed) == alone
    order = source(num_samples, BatchLayout(size, 1), packed).order
    expected = [number for p in range(consumed, consumed + 4 * size) for number in order.samples_at(p).tolist()]
    assert sum(alone, []) == expected


@settings(max_examples=30)
@given(num_samples=st.integers(1, 30), done=st.integers(0, 6), packed=PACKED)
def test_a_resumed_run_gets_the_very_next_samples(num_samples, done, packed):
    layout = BatchLayout(4, 2)
    expected = [seen(step) for step in islice(source(num_samples, layout, packed), done + 3)][done:]
    interrupted = source(num_samples, layout, packed)
    list(islice(interrupted, done))
    assert interrupted.consumed_samples == done * 4
    resumed = source(num_samples, layout, packed, consumed_samples=interrupted.consumed_samples)
    for batches in (resumed, interrupted):  # which goes on where it is iterated over again
        assert [seen(step) for step in islice(batches, 3)] == expected


@pytest.mark.parametrize("packed", ["", "next-fit"])
def test_threads_that_build_ahead_change_nothing_and_what_they_raise_arrives(packed):
    layout = BatchLayout(4, 2)
    plain = [seen(step) for step in islice(source(11, layout, packed), 8)]
    batches = source(11, layout, packed, prefetch=3)
    assert [seen(step) for step in islice(batches, 8)] == plain
    assert batches.consumed_samples == 32  # of what was handed out, not of what was built
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]
    batches.dataset = []
    with pytest.raises(IndexError):
        next(iter(batches))


@settings(max_examples=40)
@given(layout=LAYOUT, packed=PACKED, multiple=st.integers(1, 3), pad_multiple=st.integers(1, 2))
def test_few_microbatches_hold_the_samples_of_the_steps_and_no_more_positions_than_allowed(
    layout, packed, multiple, pad_multiple
):
    dp, micro, per_rank = layout
    sizes = BatchLayout(dp * micro * per_rank * multiple, micro, 0, dp, pad_multiple)
    rank, most = source(200, sizes, packed), micro * (SEQ_LENGTH + 1)
    steps = [rank.step_at(number * sizes.global_batch_size) for number in (0, 1)]
    few = rank.in_few_microbatches(2, most, multiple)
    numbers = [[number for step in of for batch in seen(step) for number in batch] for of in (steps, [few])]
    assert sorted(numbers[0]) == sorted(numbers[1])
    assert len(few) % multiple == 0 and len(few) <= 2 * per_rank * multiple
    assert all(batch.num_samples for batch in few)
    assert all(batch.tokens.numel() <= most and batch.tokens.shape[1] % pad_multiple == 0 for batch in few)


def test_few_microbatches_are_of_like_lengths():
    rank = source(200, BatchLayout(32, 1))
    few = rank.in_few_microbatches(2, 3 * SEQ_LENGTH, 1)
    lengths = [rank.dataset.lengths[[int(number) for number in batch]] for batch in seen(few)]
    assert sum(batch.tokens.numel() for batch in few) < 1.1 * sum(map(sum, lengths))
    assert len(few) < 64 / 3


@settings(max_examples=40)
@given(num_samples=st.integers(1, 20), layout=LAYOUT, prefetch=st.integers(0, 1), packed=PACKED)
def test_an_evaluation_sees_every_sample_once_in_as_many_microbatches_a_rank(num_samples, layout, prefetch, packed):
    dp, micro, per_rank = layout

    def evaluation(rank: int) -> GlobalBatches:
        batches = source(num_samples, BatchLayout(dp * micro * per_rank, micro, rank, dp), packed, prefetch=prefetch)
        batches.end = batches.order.epoch_length(0)
        return batches

    ranks = [evaluation(rank) for rank in range(dp)]
    steps = [[len(step) for step in batches] for batches in ranks]
    assert steps == [[per_rank] * (ranks[0].num_steps or 0)] * dp
    numbers = [number for batches in ranks for step in batches for micro in seen(step) for number in micro]
    assert sorted(numbers) == list(range(num_samples))
    assert sum(batch.num_samples for batches in ranks for step in batches for batch in step) == num_samples


def test_an_evaluation_starts_at_0_each_time():
    batches = source(7, BatchLayout(3, 1), end=5)
    assert [seen(step) for step in batches] == [seen(step) for step in batches]
    assert batches.num_steps == 2 and batches.consumed_samples == 0


# From token ids to what a step reads: input, label and loss of each position, padded or packed.

ANSWER = [False, False, True, True]
LONG = sample_from_ids([1, 2, 3, 4], ANSWER, 9)
SHORT = sample_from_ids([7, 8], [False, True], 9)


@pytest.mark.parametrize(
    ("ids", "trained", "seq_length", "expected"),
    [
        ([5, 6, 7, 8], ANSWER, 10, ([5, 6, 7], [6, 7, 8], [0, 1, 1])),
        ([5, 6], [True, True], 10, ([5], [6], [1])),  # the first token is read and never predicted
        ([5], [True], 10, ([], [], [])),
        ([5, 6, 7, 8], ANSWER, 3, ([5, 6, 7], [6, 7, 8], [0, 1, 1])),  # seq_length counts positions of the input
        ([5, 6, 7, 8], ANSWER, 2, ([5, 6], [6, 7], [0, 1])),
        ([5, 6, 7, 8], ANSWER, 1, ([], [], [])),  # no token to learn is left
        ([5, 6, 7, 8], [False, True, False, False], 10, ([5], [6], [1])),  # nothing behind the last token to learn
    ],
)
def test_each_position_predicts_the_next_token(ids, trained, seq_length, expected):
    sample = sample_from_ids(ids, trained, seq_length)
    assert (sample.tokens.tolist(), sample.labels.tolist(), sample.loss_mask.tolist()) == expected
    assert len(sample) == len(expected[0])


def test_rows_are_padded_on_the_right_to_the_longest_or_to_a_fixed_length():
    batch = pad([[LONG], [SHORT]], 1, 99)
    assert batch.tokens.tolist() == [[1, 2, 3], [7, 99, 99]]
    assert batch.labels.tolist() == [[2, 3, 4], [8, 99, 99]]
    assert batch.loss_mask.tolist() == [[0, 1, 1], [1, 0, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2], [0, 1, 2]]
    assert (batch.num_samples, batch.num_loss_tokens, batch.cu_seqlens, batch.lengths) == (2, 3, None, None)
    assert [t.dtype for t in (batch.tokens, batch.labels, batch.position_ids)] == [torch.int64] * 3
    assert batch.loss_mask.dtype == torch.float32
    batch = pad([[SHORT], []], 1, 99)  # a row without a sample is padding
    assert batch.tokens.tolist() == [[7], [99]]
    assert (batch.loss_mask.tolist(), batch.num_samples) == ([[1], [0]], 1)
    nothing = pad([[], []], 2, 99)
    assert nothing.tokens.shape == (2, 2) and nothing.num_loss_tokens == nothing.num_samples == 0
    # What the samples are does not show in the shape.
    fixed = [pad([[LONG], [SHORT]], 2, 99, at_least=5), pad([[SHORT], []], 2, 99, at_least=5)]
    assert [batch.tokens.shape for batch in fixed] == [(2, 6), (2, 6)]
    assert fixed[0].labels.tolist()[1] == [8, 99, 99, 99, 99, 99] and fixed[0].num_loss_tokens == 3


def test_packed_samples_stand_in_one_row_with_their_bounds():
    batch = pack([[LONG, SHORT], [LONG]], 1, 99)
    assert batch.tokens.tolist() == [[1, 2, 3, 7, 1, 2, 3]]
    assert batch.labels.tolist() == [[2, 3, 4, 8, 2, 3, 4]]
    assert batch.loss_mask.tolist() == [[0, 1, 1, 1, 0, 1, 1]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 0, 1, 2]]
    assert batch.cu_seqlens.tolist() == [0, 3, 4, 7] and batch.cu_seqlens.dtype == torch.int32
    assert (batch.lengths, batch.num_samples) == ((3, 1, 3), 3)
    batch = batch.to(torch.device("meta"))
    tensors = [batch.tokens, batch.labels, batch.loss_mask, batch.position_ids, batch.cu_seqlens]
    assert all(tensor.is_meta for tensor in tensors) and batch.lengths == (3, 1, 3)


def test_padding_of_a_packed_row_is_sequences_of_its_own_none_longer_than_a_pack():
    batch = pack([[LONG, SHORT]], 3, 99)
    assert batch.tokens.tolist() == [[1, 2, 3, 7, 99, 99]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 0, 1]]
    assert batch.cu_seqlens.tolist() == [0, 3, 4, 6]
    assert (batch.num_samples, batch.num_loss_tokens) == (2, 3)
    nothing = pack([[], []], 2, 99)
    assert (nothing.cu_seqlens.tolist(), nothing.num_loss_tokens, nothing.num_samples) == ([0, 2], 0, 0)
    fixed = [pack([[LONG, SHORT], [SHORT]], 1, 99, at_least=6), pack([[], [LONG]], 1, 99, at_least=6)]
    assert [batch.tokens.shape for batch in fixed] == [(1, 12), (1, 12)]
    assert [batch.lengths for batch in fixed] == [(3, 1, 1, 6, 1), (3, 6, 3)]
    for batch in fixed:
        assert batch.cu_seqlens.diff().tolist() == list(batch.lengths)
        assert batch.position_ids[0].tolist() == [place for length in batch.lengths for place in range(length)]
