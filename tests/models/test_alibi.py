"""ALiBi's slopes against transformers', and the core attention with it against scores written out."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from transformers.models.bloom.modeling_bloom import build_alibi_tensor

from megatron_peft.models.alibi import AlibiAttention, AlibiBias, alibi_slopes
from tests.one_rank import one_rank

S, BATCH, HEADS, DIM = 7, 2, 6, 8


@pytest.fixture(scope="module", autouse=True)
def world():
    with one_rank():
        yield


def _attention(bias=None):
    config = SimpleNamespace(kv_channels=DIM, attention_dropout=0.0)
    bias = bias or AlibiBias(HEADS, 0, 1)
    return AlibiAttention(config, layer_number=1, attn_mask_type=AttnMaskType.causal, attention_type="self", bias=bias)


def _qkv(num_queries=S, num_keys=S, heads=HEADS):
    torch.manual_seed(0)
    return torch.randn(num_queries, BATCH, heads, DIM), *torch.randn(2, num_keys, BATCH, heads, DIM)


def _slopes(num_heads):
    """transformers' own: its bias of the key at position 1."""
    return build_alibi_tensor(torch.ones(1, 2), num_heads, torch.float32)[:, 0, 1]


def _reference(query, key, value, hidden=None, slopes=None):
    """Bloom's form, slope x key position; `hidden` [b, k] on top of the causal mask."""
    num_queries, num_keys = query.shape[0], key.shape[0]
    slopes = _slopes(HEADS) if slopes is None else slopes
    scores = torch.einsum("sbnd,kbnd->bnsk", query, key) / math.sqrt(DIM)
    scores = scores + slopes[:, None, None] * torch.arange(num_keys)
    position = torch.arange(num_keys - num_queries, num_keys)[:, None]
    future = torch.arange(num_keys) > position
    if hidden is not None:
        future = future | (hidden[:, None, None] & (torch.arange(num_keys) != position))
    weights = scores.masked_fill(future, -torch.inf).softmax(-1)
    return torch.einsum("bnsk,kbnd->sbnd", weights, value).flatten(2)


@pytest.mark.parametrize("num_heads", [1, 2, 3, 6, 8, 12, 32, 52, 112])
def test_slopes_are_those_of_transformers(num_heads):
    torch.testing.assert_close(alibi_slopes(num_heads), _slopes(num_heads))


@pytest.mark.parametrize("num_queries", [S, 3, 1])
def test_queries_are_the_last_of_a_cache(num_queries):
    qkv = _qkv(num_queries)
    torch.testing.assert_close(_attention()(*qkv, None), _reference(*qkv))


@pytest.mark.parametrize("num_queries", [S, 1])
def test_hidden_keys_are_not_seen(num_queries):
    """Left padding of the second sample: its scores are those of the sample without padding."""
    query, key, value = qkv = _qkv(num_queries)
    hidden = torch.zeros(BATCH, S, dtype=torch.bool)
    hidden[1, :3] = True
    found = _attention()(*qkv, hidden[:, None, None])
    torch.testing.assert_close(found, _reference(*qkv, hidden))
    alone = _attention()(query[-1:, 1:], key[3:, 1:], value[3:, 1:], None)
    torch.testing.assert_close(found[-1:, 1:], alone)


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


def test_a_rank_has_the_slopes_of_its_own_heads():
    qkv = _qkv(heads=2)
    for rank in range(3):
        own = _slopes(HEADS)[2 * rank : 2 * rank + 2]
        found = _attention(AlibiBias(HEADS, rank, 3))(*qkv, None)
        torch.testing.assert_close(found, _reference(*qkv, slopes=own))


def test_layers_share_one_bias_whatever_the_lengths():
    """Short, long, short again, another type: each as if it were the first."""
    bias = AlibiBias(HEADS, 0, 1)
    query = torch.empty(0)
    kept = []
    for num_queries, num_keys in ((5, 5), (4, 300), (300, 300), (2, 7)):
        found = bias.of(num_queries, num_keys, query)
        torch.testing.assert_close(found, AlibiBias(HEADS, 0, 1).of(num_queries, num_keys, query))
        kept.append(found.untyped_storage().data_ptr())
    assert kept[1] == kept[2] == kept[3]
    assert bias.of(5, 5, query.double()).dtype == torch.float64


def test_neighbours_far_from_the_start_differ_in_bfloat16():
    """slope x position would give the last two keys of 2,000 the same bias."""
    row = AlibiBias(8, 0, 1).of(2000, 2000, torch.empty(0, dtype=torch.bfloat16))[0, -1]
    assert row[-2:].tolist() == [-0.5, 0.0]
    assert torch.tensor([0.5 * 1998, 0.5 * 1999]).bfloat16().unique().numel() == 1


def test_gradients_are_those_of_the_reference():
    qkv = [x.requires_grad_() for x in _qkv()]
    weights = torch.randn(S, BATCH, HEADS * DIM)
    found = torch.autograd.grad((_attention()(*qkv, None) * weights).sum(), qkv)
    expected = torch.autograd.grad((_reference(*qkv) * weights).sum(), qkv)
    torch.testing.assert_close(found, expected)
