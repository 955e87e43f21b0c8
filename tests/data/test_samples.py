"""From token ids to what a step reads: input, label and loss of each position, padded or packed."""

import pytest
import torch

from megatron_peft.data.samples import pack, pad, sample_from_ids

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


def test_rows_are_padded_on_the_right_to_the_longest():
    batch = pad([[LONG], [SHORT]], 1, 99)
    assert batch.tokens.tolist() == [[1, 2, 3], [7, 99, 99]]
    assert batch.labels.tolist() == [[2, 3, 4], [8, 99, 99]]
    assert batch.loss_mask.tolist() == [[0, 1, 1], [1, 0, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2], [0, 1, 2]]
    assert (batch.num_samples, batch.num_loss_tokens, batch.cu_seqlens, batch.max_seqlen) == (2, 3, None, None)
    assert [t.dtype for t in (batch.tokens, batch.labels, batch.position_ids)] == [torch.int64] * 3
    assert batch.loss_mask.dtype == torch.float32


def test_a_row_without_a_sample_is_padding():
    batch = pad([[SHORT], []], 1, 99)
    assert batch.tokens.tolist() == [[7], [99]]
    assert (batch.loss_mask.tolist(), batch.num_samples) == ([[1], [0]], 1)
    nothing = pad([[], []], 2, 99)
    assert nothing.tokens.shape == (2, 2) and nothing.num_loss_tokens == nothing.num_samples == 0


def test_packed_samples_stand_in_one_row_with_their_bounds():
    batch = pack([[LONG, SHORT], [LONG]], 1, 99)
    assert batch.tokens.tolist() == [[1, 2, 3, 7, 1, 2, 3]]
    assert batch.labels.tolist() == [[2, 3, 4, 8, 2, 3, 4]]
    assert batch.loss_mask.tolist() == [[0, 1, 1, 1, 0, 1, 1]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 0, 1, 2]]
    assert batch.cu_seqlens.tolist() == [0, 3, 4, 7] and batch.cu_seqlens.dtype == torch.int32
    assert (batch.max_seqlen, batch.num_samples) == (3, 3)


def test_padding_of_a_packed_row_is_a_sequence_of_its_own():
    batch = pack([[LONG, SHORT]], 3, 99)
    assert batch.tokens.tolist() == [[1, 2, 3, 7, 99, 99]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 0, 1]]
    assert batch.cu_seqlens.tolist() == [0, 3, 4, 6]
    assert (batch.num_samples, batch.num_loss_tokens) == (2, 3)
    nothing = pack([[], []], 2, 99)
    assert (nothing.cu_seqlens.tolist(), nothing.num_loss_tokens, nothing.num_samples) == ([0, 2], 0, 0)


def test_a_microbatch_moves_whole():
    moved = pack([[LONG]], 1, 99).to(torch.device("meta"))
    tensors = [moved.tokens, moved.labels, moved.loss_mask, moved.position_ids, moved.cu_seqlens]
    assert all(tensor.is_meta for tensor in tensors) and moved.max_seqlen == 3
