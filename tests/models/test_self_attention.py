"""A cache of turned keys gives the logits of megatron-core's own, to the last bit, and is not touched again."""

from __future__ import annotations

import pytest
import torch
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.transformer.attention import SelfAttention

from megatron_peft.models.self_attention import CachingSelfAttention
from tests.one_rank import one_rank
from tests.tiny_gpt import tiny_gpt

PIECES = [3, 1, 4, 1, 5], [9], [2, 6], [5]


@pytest.fixture(scope="module", autouse=True)
def world():
    with one_rank():
        yield


@torch.no_grad()
def _logits(model):
    """Of two rows, piece by piece through one cache."""
    cache, logits = StaticInferenceContext(2, 9), []
    cache.materialize_only_last_token_logits = False
    for piece in PIECES:
        first = cache.sequence_len_offset
        tokens = torch.tensor([piece, [token + 1 for token in piece]])
        positions = torch.arange(first, first + len(piece)).expand_as(tokens)
        logits.append(model(tokens, positions, None, inference_context=cache, runtime_gather_output=True))
        cache.increment_sequence_len_offset(len(piece))
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("embedding", ["rope", "alibi"])
def test_logits_are_those_of_megatron_cores_own_attention(embedding):
    model = tiny_gpt({"position_embedding": embedding, "num_query_groups": 4 if embedding == "alibi" else 2}).eval()
    found = _logits(model)
    for layer in model.decoder.layers:
        assert type(layer.self_attention) is CachingSelfAttention
        layer.self_attention.__class__ = SelfAttention
    assert torch.equal(found, _logits(model))


def test_attention_reads_keys_from_the_cache_itself():
    model, seen = tiny_gpt().eval(), []
    for layer in model.decoder.layers:
        layer.self_attention.core_attention.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
    cache = StaticInferenceContext(1, 4)
    with torch.no_grad():
        model(
            torch.tensor([[1, 2, 3]]), torch.arange(3)[None], None, inference_context=cache, runtime_gather_output=True
        )
    held = [keys.data_ptr() for keys, _ in cache.key_value_memory_dict.values()]
    assert [keys.data_ptr() for keys in seen] == held
