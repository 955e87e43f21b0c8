"""A forward with a cache, and what is off meanwhile; how continuations are batched.

Every layout, stage and method is in test_generation.py, scores too; real replicas are in test_harness.py.
"""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from megatron_peft.config import ConfigurationError
from megatron_peft.evaluation import generation
from megatron_peft.evaluation.generation import (
    SEQUENCE_PARALLEL_SWITCHES,
    CachedRows,
    Continuation,
    inference,
    left_padded,
    score_continuations,
)
from tests.one_rank import one_rank
from tests.tiny_gpt import tiny_gpt

MODEL = [nn.Module()]
MODEL[0].vocab_size = 10
TEXT, OTHER = [3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1]


def test_a_cache_gives_the_logits_of_the_whole_text():
    """In pieces, beside a shorter row, after rows were dropped and doubled, with the cache still empty or not."""
    with one_rank():
        chunks = [tiny_gpt()]
        with inference(chunks):
            texts = (torch.tensor([text]) for text in (TEXT, OTHER + TEXT[5:]))
            whole, other = (chunks[0](text, torch.arange(text.shape[1])[None], None)[0] for text in texts)
            tokens, padding = left_padded([OTHER, TEXT[:5]])
            assert padding == [2, 0]
            rows = CachedRows(chunks, padding, 10)
            first = rows.forward(tokens, every_position=True)
            assert torch.allclose(first[1], whole[:5], atol=1e-5) and torch.allclose(first[0, 2:], other[:3], atol=1e-5)
            rows.keep([1, 1, 0])
            rest = rows.forward(torch.tensor([TEXT[5:]] * 3), every_position=True)
            assert torch.allclose(rest, torch.stack([whole[5:], whole[5:], other[3:]]), atol=1e-5)

            empty = CachedRows(chunks, [0], 10)
            empty.keep([0, 0])
            last = empty.forward(torch.tensor([TEXT, TEXT]))
            assert torch.allclose(last, whole[-1:].expand(2, 1, -1), atol=1e-5)


def _chunk(config):
    chunk, norm = nn.Module(), nn.Module()
    chunk.norm, norm.config, norm.sequence_parallel = norm, config, True
    chunk.scatter_to_sequence_parallel, chunk.reduce_scatter_embeddings = True, False
    return chunk


def test_everything_is_off_inside_and_after_an_error_as_it_was():
    config = SimpleNamespace(sequence_parallel=True)
    training, evaluated = _chunk(config), _chunk(config).eval()
    with pytest.raises(KeyError), inference([training, evaluated]):
        owners = [owner for chunk in (training, evaluated) for owner in (chunk, chunk.norm, config)]
        assert not any(getattr(owner, name, False) for owner in owners for name in SEQUENCE_PARALLEL_SWITCHES)
        assert not training.training and not torch.is_grad_enabled()
        raise KeyError
    assert config.sequence_parallel and training.norm.sequence_parallel and training.scatter_to_sequence_parallel
    assert training.training and not evaluated.training and torch.is_grad_enabled()
    assert not training.reduce_scatter_embeddings


@pytest.fixture
def passes(monkeypatch):
    """MODEL's, which always says the token after the last: the rows of each of them."""
    seen: list[list] = []

    def logits(model_chunks, rows):
        seen.append(rows)
        texts = [[context[-1], *before] for context, before in rows]
        longest = max(map(len, texts))
        said = torch.tensor([[(token + 1) % 10 for token in text] + [0] * (longest - len(text)) for text in texts])
        return 10.0 * nn.functional.one_hot(said, 10)

    monkeypatch.setattr(generation, "_logits", logits)
    monkeypatch.setattr(generation, "from_last_stage", lambda values: values)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: torch.device("cpu"))
    return seen


def test_choices_of_one_token_are_one_row(passes):
    choices = [Continuation((1, 2), (token,)) for token in (3, 4, 5)]
    choices += [Continuation((1, 2), (3, token)) for token in (4, 5)]
    scores = score_continuations(MODEL, choices, batch_size=8)
    assert passes == [[((1, 2), ()), ((1, 2), (3,))]]
    assert [one.is_greedy for one in scores] == [True, False, False, True, False]
    assert scores[0].log_likelihood > scores[1].log_likelihood == scores[2].log_likelihood


def test_batches_hold_like_lengths_and_answers_come_back_in_order(passes):
    items = [Continuation((0,) * length, (1 if length % 2 else 2,)) for length in (1, 4, 2, 4, 3)]
    scores = score_continuations(MODEL, items, 2)
    assert [sorted({len(context) for context, _ in rows}) for rows in passes] == [[4], [2, 3], [1]]
    assert [one.is_greedy for one in scores] == [True, False, False, False, True]


def test_a_batch_is_cut_where_its_logits_would_not_fit(passes, monkeypatch):
    monkeypatch.setattr(generation, "MAX_LOGITS", 60)
    items = [Continuation((length,), (1,) * length) for length in (9, 3, 2, 2)]
    score_continuations(MODEL, items, batch_size=8)
    assert [len(rows) for rows in passes] == [1, 2, 1], "9 x 10 alone, then two rows of at most 3 x 10"


def test_nothing_to_score_is_refused():
    with pytest.raises(ConfigurationError, match="has no token"):
        score_continuations(MODEL, [Continuation((), (1,))], 1)
