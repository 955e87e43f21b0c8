"""What is drawn: transformers' distribution, one number a token, whatever the order of rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from megatron_peft.config import ConfigurationError
from megatron_peft.evaluation.sampling import RandomStreams, Sampling, choose_tokens, probabilities


def _logits(seed, rows=3, vocabulary=40):
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * 3


@settings(max_examples=60)
@given(st.integers(0, 10**6), st.floats(0.1, 5), st.floats(0.05, 1), st.integers(0, 60))
def test_probabilities_are_those_of_transformers_warpers(seed, temperature, top_p, top_k):
    logits = _logits(seed)
    warpers = [TemperatureLogitsWarper(temperature), *([TopKLogitsWarper(top_k)] if top_k else [])]
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    expected = logits
    for warper in warpers:
        expected = warper(None, expected)
    found = probabilities(logits, Sampling(temperature, top_p, top_k))
    assert torch.allclose(found, expected.softmax(-1), atol=1e-6)


def test_the_likeliest_needs_no_draw():
    assert choose_tokens(_logits(1), Sampling(), None).tolist() == _logits(1).argmax(-1).tolist()


def test_frequencies_are_the_probabilities():
    sampling = Sampling(temperature=2.0, top_p=0.8)
    logits = _logits(2, rows=1, vocabulary=6)
    draws = torch.rand(20_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    drawn = choose_tokens(logits.expand(20_000, -1), sampling, draws)
    frequencies = torch.bincount(drawn, minlength=6) / 20_000
    assert torch.allclose(frequencies, probabilities(logits, sampling)[0], atol=0.015)


@pytest.mark.parametrize("draw", [0.0, 1 - 1e-16])
def test_the_ends_of_the_interval_draw_tokens_that_are_kept(draw):
    logits = torch.tensor([[-torch.inf, 1.0, 0.5, -torch.inf]])
    token = choose_tokens(logits, Sampling(temperature=1.0), torch.tensor([draw], dtype=torch.float64))
    assert token.item() == (1 if draw == 0 else 2)


def test_rounding_of_the_logits_does_not_move_a_draw():
    """In order of probability two tokens that are almost equal would change places, and the answer with them."""
    logits = torch.zeros(1, 8)
    nudged = logits + 1e-7 * torch.randn(1, 8, generator=torch.Generator().manual_seed(1))
    for draw in torch.arange(0.03, 1, 0.1, dtype=torch.float64):
        chosen = [choose_tokens(x, Sampling(temperature=1.0), draw[None]).item() for x in (logits, nudged)]
        assert chosen[0] == chosen[1]


def test_a_row_has_its_own_stream():
    together, alone = RandomStreams(3, ["a", "b"]), RandomStreams(3, ["b"])
    first = together.draw([0, 1])
    assert first[0] != first[1]
    assert together.draw([1]) != first[1]
    assert first[1] == alone.draw([0])
    assert RandomStreams(4, ["b"]).draw([0]) != first[1]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -1.0}, "--temperature is -1.0; it cannot be negative"),
        ({"top_k": -1}, "--top-k is -1"),
        ({"top_p": 0.0}, "--top-p is 0.0; it is a probability, above 0 and at most 1"),
    ],
)
def test_values_out_of_range_are_refused(values, message):
    with pytest.raises(ConfigurationError, match=message):
        Sampling(**values)
