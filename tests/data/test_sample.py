from __future__ import annotations

from megatron_peft.data.sample import sample_from_ids


def as_lists(sample):
    return sample.tokens.tolist(), sample.labels.tolist(), sample.loss_mask.tolist()


def test_each_position_predicts_the_next_token():
    sample = sample_from_ids([5, 6, 7, 8], [False, False, True, True], 10)
    assert as_lists(sample) == ([5, 6, 7], [6, 7, 8], [0, 1, 1])


def test_the_first_token_is_read_and_never_predicted():
    assert as_lists(sample_from_ids([5, 6], [True, True], 10)) == ([5], [6], [1])
    assert len(sample_from_ids([5], [True], 10)) == 0


def test_seq_length_counts_input_positions():
    ids, trained = [5, 6, 7, 8], [False, False, True, True]
    assert as_lists(sample_from_ids(ids, trained, 3)) == ([5, 6, 7], [6, 7, 8], [0, 1, 1])
    assert as_lists(sample_from_ids(ids, trained, 2)) == ([5, 6], [6, 7], [0, 1])


def test_without_a_token_to_learn_nothing_is_left():
    assert len(sample_from_ids([5, 6, 7, 8], [False, False, True, True], 1)) == 0


def test_nothing_is_kept_behind_the_last_token_to_learn():
    assert as_lists(sample_from_ids([5, 6, 7, 8], [False, True, False, False], 10)) == ([5], [6], [1])
