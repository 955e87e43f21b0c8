"""A cache on one rank; every layout and method is in test_generation.py."""

from __future__ import annotations

import torch

from megatron_peft.evaluation.cache import CachedRows, left_padded
from megatron_peft.evaluation.stages import broadcast_from_last_stage
from megatron_peft.evaluation.switches import inference
from tests.one_rank import one_rank
from tests.tiny_gpt import tiny_gpt

TEXT = [3, 1, 4, 1, 5, 9, 2, 6]
OTHER = [2, 7, 1]


def test_a_cache_gives_the_logits_of_the_whole_text():
    """In pieces, beside a shorter row, after rows were dropped and doubled, with the cache still empty or not."""
    with one_rank():
        chunks = [tiny_gpt()]
        with inference(chunks):
            whole = _logits_of(chunks, TEXT)
            tokens, padding = left_padded([OTHER, TEXT[:5]])
            assert padding == [2, 0]
            rows = CachedRows(chunks, padding, 10)
            first = rows.forward(tokens, every_position=True)
            assert first is not None and torch.allclose(first[1], whole[:5], atol=1e-5)
            assert torch.allclose(first[0, 2:], _logits_of(chunks, OTHER), atol=1e-5)
            rows.keep([1, 1, 0])
            rest = rows.forward(torch.tensor([TEXT[5:]] * 3), every_position=True)
            assert rest is not None and torch.allclose(rest[:2], whole[5:].expand(2, -1, -1), atol=1e-5)
            assert torch.allclose(rest[2], _logits_of(chunks, OTHER + TEXT[5:])[3:], atol=1e-5)

            empty = CachedRows(chunks, [0], 10)
            empty.keep([0, 0])
            last = empty.forward(torch.tensor([TEXT, TEXT]))
            assert last is not None and torch.allclose(last, whole[-1:].expand(2, 1, -1), atol=1e-5)
        values = torch.tensor([1.0])
        assert broadcast_from_last_stage(values) is values


def _logits_of(chunks, text):
    tokens = torch.tensor([text])
    return chunks[0](tokens, torch.arange(len(text))[None], None)[0]
