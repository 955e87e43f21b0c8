"""Core attention, plain and with ALiBi, against scores written out; a cache of rotated keys against megatron-core's.

Letters: s queries, k keys, b batch, n heads, d features of a head.
"""

import math
from types import SimpleNamespace

import pytest
import torch
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.transformer.attention import SelfAttention
from transformers.models.bloom.modeling_bloom import build_alibi_tensor

from megatron_peft.models import layers
from megatron_peft.models.kernels import Installed
from megatron_peft.models.layers import AlibiAttention, AlibiBias, PackedSamples, ScaledDotProductAttention
from megatron_peft.runtime.precision import full_precision
from tests.benchmarks.gpu_subjects import device, relative
from tests.one_rank import one_rank
from tests.tiny_gpt import SIZES, tiny_gpt

S, BATCH, HEADS, DIM = 7, 2, 6, 8
SCALE = 1 / math.sqrt(DIM)
KINDS = {"plain": 2, "alibi": HEADS}  # and their key-value heads: Bloom does not group its queries
VOCAB_SIZE = SIZES["vocab_size"]
PIECES = [3, 1, 4, 1, 5], [9], [2, 6], [5]


@pytest.fixture(scope="module", autouse=True)
def world():
    with one_rank():
        yield


def _attention(kind="plain", bias=None, **settings):
    config = SimpleNamespace(kv_channels=DIM, attention_dropout=0.0, sequence_parallel=False)
    if kind == "alibi":
        bias = bias or AlibiBias(HEADS, 0, 1)
        return AlibiAttention(config, 1, bias=bias, **settings)
    return ScaledDotProductAttention(config, 1, **settings)


def _qkv(num_queries=S, heads=HEADS, groups=HEADS):
    torch.manual_seed(0)
    return torch.randn(num_queries, BATCH, heads, DIM), *torch.randn(2, S, BATCH, groups, DIM)


def _slopes(num_heads=HEADS):
    """transformers' own: its bias of the key at position 1."""
    return build_alibi_tensor(torch.ones(1, 2), num_heads, torch.float32)[:, 0, 1]


def _reference(query, key, value, kind="plain", hidden=None, scale=SCALE, slopes=None):
    """Scores and softmax in the open, Bloom's slope x key position; `hidden` [b, 1, 1, k] on top of the causal mask."""
    num_queries, num_keys = query.shape[0], key.shape[0]
    key, value = (x.repeat_interleave(query.shape[2] // key.shape[2], dim=2) for x in (key, value))
    scores = torch.einsum("sbnd,kbnd->bnsk", query, key) * scale
    if kind == "alibi":
        scores = scores + (_slopes() if slopes is None else slopes)[:, None, None] * torch.arange(num_keys)
    position = torch.arange(num_keys - num_queries, num_keys)[:, None]
    future = torch.arange(num_keys) > position
    if hidden is not None:
        future = future | (hidden & (torch.arange(num_keys) != position))
    weights = scores.masked_fill(future, -torch.inf).softmax(-1)
    return torch.einsum("bnsk,kbnd->sbnd", weights, value).flatten(2)


@pytest.mark.parametrize("groups", [HEADS, 2, 1])
def test_causal_with_grouped_queries_and_a_scale_of_its_own(groups):
    qkv = _qkv(groups=groups)
    torch.testing.assert_close(_attention()(*qkv, None), _reference(*qkv))
    torch.testing.assert_close(_attention(softmax_scale=0.1)(*qkv, None), _reference(*qkv, scale=0.1))


@pytest.mark.parametrize("kind", KINDS)
def test_queries_are_the_last_of_a_cache(kind):
    for num_queries in (S, 5, 2, 1):
        qkv = _qkv(num_queries, groups=KINDS[kind])
        torch.testing.assert_close(_attention(kind)(*qkv, None), _reference(*qkv, kind))


@pytest.mark.parametrize("num_queries", [1, S])
@pytest.mark.parametrize("kind", KINDS)
def test_hidden_keys_are_not_seen(kind, num_queries):
    """Left padding of the second sample, as in generation: its last token is that of the sample without padding."""
    query, key, value = qkv = _qkv(num_queries, groups=KINDS[kind])
    hidden = torch.zeros(BATCH, 1, 1, S, dtype=torch.bool)
    hidden[1, ..., :3] = True
    found = _attention(kind)(*qkv, hidden)
    torch.testing.assert_close(found, _reference(*qkv, kind, hidden))
    assert torch.isfinite(found).all()  # padded queries too, which see nothing but themselves
    alone = _attention(kind)(query[-1:, 1:], key[3:, 1:], value[3:, 1:], None)
    torch.testing.assert_close(found[-1:, 1:], alone)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_samples_attend_to_themselves_only(kind):
    qkv = [x[:, 0] for x in _qkv(groups=KINDS[kind])]
    ends = torch.tensor([0, 1, 4, S], dtype=torch.int32)
    packing = PackedSamples.of(ends, (1, 3, S - 4), torch.tensor([0, 0, 1, 2, *range(S - 4)]))
    alone = [_reference(*(x[first:end, None] for x in qkv), kind) for first, end in ((0, 1), (1, 4), (4, S))]
    torch.testing.assert_close(_attention(kind)(*qkv, None, packed_seq_params=packing), torch.cat(alone))


@pytest.mark.parametrize("length", [S, 37, 64])
@pytest.mark.parametrize(("dtype", "ulps"), [(torch.float32, 64), (torch.bfloat16, 4)], ids=["float32", "bf16"])
@pytest.mark.parametrize("kind", ["plain", pytest.param("alibi", marks=pytest.mark.gpu("alibi"))])
@full_precision
def test_output_and_gradients_are_those_of_the_reference_in_float64(figure, kind, dtype, ulps, length):
    torch.manual_seed(0)
    sizes = [(length, BATCH, heads, DIM) for heads in (HEADS, KINDS[kind], KINDS[kind])]
    drawn = [torch.randn(size, device="cpu").bfloat16() for size in (*sizes, (length, BATCH, HEADS * DIM))]
    *qkv, weights = [x.to(device(), dtype).requires_grad_() for x in drawn]
    *exact, exact_weights = [x.double().requires_grad_() for x in drawn]
    out, expected = _attention(kind)(*qkv, None), _reference(*exact, kind)
    found = [out, *torch.autograd.grad(out, qkv, weights)]
    pairs = zip(found, [expected, *torch.autograd.grad(expected, exact, exact_weights)], strict=True)
    name = f"{kind}, {length} positions, {dtype}".replace("torch.", "")
    figure(name, max(relative(*pair) for pair in pairs), ulps * torch.finfo(dtype).eps)


def test_dropout_of_heads_acts_in_training_only_keeps_the_mean_and_leaves_the_common_generator_alone():
    attention, qkv = _attention(attention_dropout=0.5), _qkv()
    plain, before = _reference(*qkv), torch.get_rng_state()
    torch.testing.assert_close(attention.eval()(*qkv, None), plain)
    draws = torch.stack([attention.train()(*qkv, None) for _ in range(400)])
    assert not torch.equal(draws[0], draws[1])
    torch.testing.assert_close(draws.mean(0), plain, rtol=0, atol=0.6)
    assert torch.equal(torch.get_rng_state(), before)


def test_slopes_are_those_of_transformers():
    for num_heads in (1, 2, 3, 6, 8, 12, 32, 52, 112):
        torch.testing.assert_close(layers.alibi_slopes(num_heads), _slopes(num_heads))


def test_a_rank_has_the_slopes_of_its_own_heads():
    qkv = _qkv(heads=2, groups=2)
    for rank in range(3):
        own = _slopes()[2 * rank : 2 * rank + 2]
        found = _attention("alibi", AlibiBias(HEADS, rank, 3))(*qkv, None)
        torch.testing.assert_close(found, _reference(*qkv, "alibi", slopes=own))


def test_layers_share_one_bias_whatever_the_lengths():
    """Short, long, short again, another type: each as if it were the first."""
    bias, query, kept = AlibiBias(HEADS, 0, 1), torch.empty(0), []
    for num_queries, num_keys in ((5, 5), (4, 300), (300, 300), (2, 7)):
        found = bias.get(num_queries, num_keys, query)
        torch.testing.assert_close(found, AlibiBias(HEADS, 0, 1).get(num_queries, num_keys, query))
        kept.append(found.untyped_storage().data_ptr())
    assert kept[1] == kept[2] == kept[3]
    assert bias.get(5, 5, query.double()).dtype == torch.float64


def test_neighbors_far_from_the_start_differ_in_bfloat16():
    """slope x position would give the last two keys of 2,000 the same bias."""
    row = AlibiBias(8, 0, 8).get(2000, 2000, torch.empty(0, dtype=torch.bfloat16))[0, -1]  # of the first of 8 heads
    assert row[-2:].tolist() == [-0.5, 0.0]
    assert torch.tensor([0.5 * 1998, 0.5 * 1999]).bfloat16().unique().numel() == 1


@torch.no_grad()
def _logits(model, cache, pieces):
    """Of two rows, piece by piece through the cache."""
    logits = []
    cache.materialize_only_last_token_logits = False
    for piece in pieces:
        first = cache.sequence_len_offset
        tokens = torch.tensor([piece, [token + 1 for token in piece]])
        positions = torch.arange(first, first + len(piece)).expand_as(tokens)
        logits.append(model(tokens, positions, None, inference_context=cache, runtime_gather_output=True))
        cache.increment_sequence_len_offset(len(piece))
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize(("embedding", "groups"), [("rope", 2), ("alibi", 4)])
def test_logits_of_rotated_keys_are_those_of_megatron_cores_own_attention_bit_for_bit(embedding, groups):
    model = tiny_gpt({"position_embedding": embedding, "num_query_groups": groups}).eval()
    found = _logits(model, StaticInferenceContext(2, 9), PIECES)
    for layer in model.decoder.layers:
        assert type(layer.self_attention) is layers.CachingSelfAttention
        layer.self_attention.__class__ = SelfAttention
    assert torch.equal(found, _logits(model, StaticInferenceContext(2, 9), PIECES))


def test_attention_reads_keys_from_the_cache_itself():
    model, seen, cache = tiny_gpt().eval(), [], StaticInferenceContext(2, 5)
    for layer in model.decoder.layers:
        layer.self_attention.core_attention.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
    _logits(model, cache, PIECES[:1])
    held = [keys.data_ptr() for keys, _ in cache.key_value_memory_dict.values()]
    assert [keys.data_ptr() for keys in seen] == held


@pytest.mark.gpu("attention")
@pytest.mark.parametrize("backend", ["unfused", "local", "flash", "fused", "auto", "transformer_engine"])
def test_a_backend_chooses_the_kernel_and_keeps_the_numbers(figure, backend):
    """A profile names the kernel that ran. A CPU has torch's fused kernel for CPUs, and the one in full.

    On a GPU in bf16, which its kernels take. Transformer Engine, by its own choice, chooses once in a process.
    """
    has_gpu, engine = torch.cuda.is_available(), backend == "transformer_engine"
    if engine and not (has_gpu and Installed.detected().transformer_engine):
        pytest.skip("Transformer Engine needs a GPU")
    chosen = {"transformer_impl": backend} if engine else {"transformer_impl": "local", "attention_backend": backend}
    unfused = {"transformer_impl": "local", "attention_backend": "unfused"}
    model, in_full = (tiny_gpt(bf16=has_gpu, **settings) for settings in (chosen, unfused))
    tokens = torch.arange(20, device=device()).reshape(2, 10)
    positions = torch.arange(10, device=device()).expand(2, 10)
    with torch.profiler.profile() as profile:
        logits = model(tokens, positions, None)
    ran = {event.key for event in profile.key_averages()}
    assert has_gpu or ("aten::_scaled_dot_product_attention_math" in ran) == (backend in ("unfused", "local"))
    words = ("flash", "fmha", "cudnn", "attention", "softmax", "efficient")
    named = sorted({one[:60] for one in ran if any(word in one.lower() for word in words)})
    differ = relative(logits[..., :VOCAB_SIZE], in_full(tokens, positions, None)[..., :VOCAB_SIZE])
    figure(backend, differ, 4 * torch.finfo(torch.bfloat16).eps if has_gpu else 1e-5, note="; ".join(named)[:400])
