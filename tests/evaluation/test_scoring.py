"""How continuations are batched; the scores themselves are compared with transformers in test_generation.py."""

from __future__ import annotations

import pytest
import torch

from megatron_peft.config import ConfigurationError
from megatron_peft.evaluation import scoring
from megatron_peft.evaluation.scoring import Continuation, score


@pytest.fixture
def passes(monkeypatch):
    """A model of ten tokens that always says the token after the last; records the rows of each pass."""
    seen: list[list] = []

    def logits(model_chunks, rows):
        seen.append(rows)
        longest = 1 + max(len(before) for _, before in rows)
        table = torch.full((len(rows), longest, 10), -5.0)
        for number, (context, before) in enumerate(rows):
            for position, token in enumerate((context[-1], *before)):
                table[number, position, (token + 1) % 10] = 5.0
        return table

    monkeypatch.setattr(scoring, "_logits", logits)
    monkeypatch.setattr(scoring, "broadcast_from_last_stage", lambda values: values)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: torch.device("cpu"))
    return seen


def _model(vocab_size=10):
    model = torch.nn.Module()
    model.vocab_size = vocab_size
    return [model]


def test_choices_of_one_token_are_one_row(passes):
    choices = [Continuation((1, 2), (token,)) for token in (3, 4, 5)] + [Continuation((1, 2), (3, 4))]
    scores = score(_model(), choices, batch_size=8)
    assert passes == [[((1, 2), ()), ((1, 2), (3,))]]
    assert [one.is_greedy for one in scores] == [True, False, False, True]
    assert scores[0].log_likelihood > scores[1].log_likelihood == scores[2].log_likelihood


def test_batches_hold_like_lengths_and_answers_come_back_in_order(passes):
    told: list[int] = []
    lengths = (1, 4, 2, 4, 3)
    items = [Continuation((0,) * length, (1 if length % 2 else 2,)) for length in lengths]
    scores = score(_model(), items, 2, told.append)
    assert [sorted({len(context) for context, _ in rows}) for rows in passes] == [[4], [2, 3], [1]]
    assert [one.is_greedy for one in scores] == [True, False, False, False, True]
    assert told == [2, 2, 1]


def test_a_batch_is_cut_where_its_logits_would_not_fit(passes, monkeypatch):
    monkeypatch.setattr(scoring, "MAX_LOGITS", 60)
    items = [Continuation((length,), (1,) * length) for length in (9, 3, 2, 2)]
    score(_model(), items, batch_size=8)
    assert [len(rows) for rows in passes] == [1, 2, 1], "9 x 10 alone, then two rows of at most 3 x 10"


def test_nothing_to_score_is_refused():
    with pytest.raises(ConfigurationError, match="has no token"):
        score(_model(), [Continuation((), (1,))], 1)
