"""The core attention against scores written out."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType

from megatron_peft.models.attention import ScaledDotProductAttention
from tests.one_rank import one_rank

S, BATCH, HEADS, GROUPS, DIM = 6, 2, 4, 2, 8
SCALE = 1 / math.sqrt(DIM)


@pytest.fixture(scope="module", autouse=True)
def world():
    with one_rank():
        yield


def _attention(**settings):
    config = SimpleNamespace(kv_channels=DIM, attention_dropout=0.0)
    return ScaledDotProductAttention(config, 1, AttnMaskType.causal, "self", **settings)


def _qkv(num_queries=S, num_keys=S, groups=GROUPS):
    torch.manual_seed(0)
    return torch.randn(num_queries, BATCH, HEADS, DIM), *torch.randn(2, num_keys, BATCH, groups, DIM)


def _reference(query, key, value, hidden=None, scale=SCALE):
    """Scores and softmax in the open; `hidden` [.., s, k] on top of the causal mask."""
    repeats = query.shape[2] // key.shape[2]
    key, value = (x.repeat_interleave(repeats, dim=2) for x in (key, value))
    scores = torch.einsum("sbnd,kbnd->bnsk", query, key) * scale
    num_queries, num_keys = scores.shape[-2:]
    position = torch.arange(num_keys - num_queries, num_keys)[:, None]
    future = torch.arange(num_keys) > position
    if hidden is not None:
        future = future | (hidden & (torch.arange(num_keys) != position))
    weights = scores.masked_fill(future, -torch.inf).softmax(-1)
    return torch.einsum("bnsk,kbnd->sbnd", weights, value).flatten(2)


@pytest.mark.parametrize("groups", [HEADS, GROUPS, 1])
def test_causal_with_grouped_queries(groups):
    qkv = _qkv(groups=groups)
    torch.testing.assert_close(_attention()(*qkv, None), _reference(*qkv))


def test_a_scale_of_its_own():
    qkv = _qkv()
    torch.testing.assert_close(_attention(softmax_scale=0.1)(*qkv, None), _reference(*qkv, scale=0.1))


@pytest.mark.parametrize("num_queries", [1, 2, 5])
def test_queries_are_the_last_of_a_cache(num_queries):
    qkv = _qkv(num_queries)
    torch.testing.assert_close(_attention()(*qkv, None), _reference(*qkv))


@pytest.mark.parametrize("num_queries", [1, S])
def test_hidden_keys_are_not_seen(num_queries):
    """Left padding of the second sample, as in generation."""
    qkv = _qkv(num_queries)
    hidden = torch.zeros(BATCH, 1, 1, S, dtype=torch.bool)
    hidden[1, ..., :3] = True
    found = _attention()(*qkv, hidden)
    torch.testing.assert_close(found, _reference(*qkv, hidden))
    assert torch.isfinite(found).all()  # padded queries too, which see nothing but themselves
    moved = [x.clone() for x in qkv]
    for x in moved[1:]:
        x[:3, 1] += 5.0
    torch.testing.assert_close(_attention()(*moved, hidden)[-1], found[-1])


def test_packed_samples_attend_to_themselves_only():
    query, key, value = (x[:, 0] for x in _qkv())
    ends = torch.tensor([0, 1, 4, S], dtype=torch.int32)
    packing = PackedSeqParams("thd", cu_seqlens_q=ends, cu_seqlens_kv=ends, max_seqlen_q=3, max_seqlen_kv=3)
    found = _attention()(query, key, value, None, packed_seq_params=packing)
    alone = [
        _reference(*(x[first:end, None] for x in (query, key, value)))
        for first, end in zip(ends[:-1], ends[1:], strict=True)
    ]
    torch.testing.assert_close(found, torch.cat(alone))


def test_dropout_acts_in_training_only_and_keeps_the_mean():
    attention, qkv = _attention(attention_dropout=0.5), _qkv()
    plain = _reference(*qkv)
    torch.testing.assert_close(attention.eval()(*qkv, None), plain)
    draws = torch.stack([attention.train()(*qkv, None) for _ in range(400)])
    assert not torch.equal(draws[0], draws[1])
    torch.testing.assert_close(draws.mean(0), plain, rtol=0, atol=0.6)


def test_dropout_of_heads_leaves_the_common_generator_alone():
    before = torch.get_rng_state()
    _attention(attention_dropout=0.5)(*_qkv_without_seeding(), None)
    assert torch.equal(torch.get_rng_state(), before)


def _qkv_without_seeding():
    ones = torch.ones(S, BATCH, HEADS, DIM)
    return ones, ones, ones
