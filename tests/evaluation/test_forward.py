"""A forward with a cache, and what is off meanwhile. Every layout, stage and method is in test_generation.py."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from megatron_peft.evaluation.cache import CachedRows, left_padded
from megatron_peft.evaluation.switches import SEQUENCE_PARALLEL_SWITCHES, inference
from tests.one_rank import one_rank
from tests.tiny_gpt import tiny_gpt

TEXT, OTHER = [3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1]


def test_a_cache_gives_the_logits_of_the_whole_text():
    """In pieces, beside a shorter row, after rows were dropped and doubled, with the cache still empty or not."""
    with one_rank():
        chunks = [tiny_gpt()]
        with inference(chunks):
            whole, other = (_logits_of(chunks, text) for text in (TEXT, OTHER + TEXT[5:]))
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


def _logits_of(chunks, text):
    return chunks[0](torch.tensor([text]), torch.arange(len(text))[None], None)[0]


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
