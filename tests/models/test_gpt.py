"""What we choose around megatron-core's GPTModel: padded vocabulary, rope, biases, embedding norm, precision."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_peft.adapters import linear
from megatron_peft.adapters.attach import attach_adapters
from megatron_peft.adapters.frozen_linear import frozen_linear
from megatron_peft.checkpoint.tensors import sharded_parameters
from megatron_peft.config import PeftConfig
from megatron_peft.models.kernels import Installed, Training
from megatron_peft.models.layers import PackedSamples
from megatron_peft.models.shape import RopeScaling
from tests.one_rank import one_rank
from tests.tiny_gpt import SIZES, tiny_gpt

VOCAB = SIZES["vocab_size"]


@pytest.fixture(scope="module", autouse=True)
def world():
    with one_rank():
        yield


def _batch():
    tokens = torch.arange(20).reshape(2, 10) % VOCAB
    return tokens, torch.arange(10).expand(2, 10), None


def _losses(model):
    return model(*_batch(), labels=(_batch()[0] * 7 + 3) % VOCAB)


@pytest.mark.parametrize("tied", [False, True])
def test_loss_and_gradients_do_not_depend_on_the_vocabularys_padding(tied):
    results = []
    for multiple in (1, 8, 128):
        model = tiny_gpt({"tied_embeddings": tied}, make_vocab_size_divisible_by=multiple)
        weight = model.shared_embedding_or_output_weight() if tied else model.output_layer.weight
        assert weight.shape[0] == -(-VOCAB // multiple) * multiple
        losses = _losses(model)
        losses.sum().backward()
        assert not weight.grad[VOCAB:].any()
        results.append((losses, weight.grad[:VOCAB]))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])


def test_padded_logits_are_never_the_largest():
    logits = tiny_gpt(make_vocab_size_divisible_by=128)(*_batch())
    assert logits.shape[-1] == 128
    assert torch.isneginf(logits[..., VOCAB:]).all() and torch.isfinite(logits[..., :VOCAB]).all()


@pytest.mark.parametrize("tied", [False, True])
def test_the_frozen_output_layer_is_megatrons_with_our_product(tied, monkeypatch: pytest.MonkeyPatch):
    """Losses and the gradients of adapters, with a padded vocabulary, beside megatron-core's own output layer."""
    products, found = [], []
    monkeypatch.setattr(linear, "frozen_linear", lambda x, call: products.append(x) or frozen_linear(x, call))
    for ours in (True, False):
        model = tiny_gpt({"tied_embeddings": tied}, make_vocab_size_divisible_by=128, cross_entropy_chunk_tokens=0)
        attach_adapters([model], PeftConfig(method="lora", target_modules=("linear_qkv", "linear_fc2")), seed=1)
        trained = [parameter for name, parameter in model.named_parameters() if ".adapter.B" in name]
        for parameter in trained:
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(parameter.numel()))
        if not ours:
            model.output_layer.is_frozen = False
        products.clear()
        losses = _losses(model)
        losses.sum().backward()
        found.append((losses, [parameter.grad for parameter in trained], len(products)))
    (losses, gradients, num_ours), (expected, their_gradients, num_theirs) = found
    torch.testing.assert_close((losses, gradients), (expected, their_gradients))
    assert num_ours == num_theirs + 1


def test_what_a_gpu_fuses_in_float32_keeps_the_gradients_of_the_unfused_model(monkeypatch: pytest.MonkeyPatch):
    """megatron-core's fused functions, run eagerly. Transformer Engine's rotary embedding needs a GPU."""
    training, found = Training(trains_weights=True, recomputes_activation=False), []
    for installed in (Installed(cuda=True), Installed(cuda=False)):
        monkeypatch.setattr(Installed, "detected", lambda installed=installed: installed)
        biased = {"linear_biases": frozenset({"linear_proj", "linear_fc2"})}
        model = tiny_gpt(biased, training, transformer_impl="local")
        assert model.config.bias_activation_fusion == model.config.bias_dropout_fusion == installed.cuda
        with torch.compiler.set_stance("force_eager"):
            _losses(model).sum().backward()
        found.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    assert (found[0] - found[1]).norm() <= 1e-6 * found[1].norm()


def test_packed_samples_have_the_losses_and_gradients_that_they_have_alone():
    """Each token turns by its position in its own sample; where samples begin is not asked of the device."""
    lengths, model = (7, 10, 3), tiny_gpt()
    samples = [(torch.arange(length) * 5 + length) % VOCAB for length in lengths]
    places = [torch.arange(length) for length in lengths]
    bounds = torch.tensor([0, 7, 17, 20], dtype=torch.int32)
    packing = PackedSamples.of(bounds, lengths, torch.cat(places))
    tokens, positions = torch.cat(samples)[None], torch.cat(places)[None]
    packed = model(tokens, positions, None, labels=(tokens * 7 + 3) % VOCAB, packed_seq_params=packing)
    rows = [(sample[None], place[None]) for sample, place in zip(samples, places, strict=True)]
    alone = torch.cat([model(row, place, None, labels=(row * 7 + 3) % VOCAB) for row, place in rows], 1)
    weights = [layer.self_attention.linear_qkv.weight for layer in model.decoder.layers]
    gradients = [torch.autograd.grad(losses.sum(), weights) for losses in (packed, alone)]
    torch.testing.assert_close((packed, gradients[0]), (alone, gradients[1]))


@pytest.mark.parametrize("numbers", [(8.0, 1.0, 4.0, 8192), (3.0, 0.5, 6.0, 100)])
def test_scaled_rope_has_the_frequencies_of_transformers(numbers):
    scaling = RopeScaling(*numbers)
    model = tiny_gpt({"rope_scaling": scaling, "kv_channels": 32, "rotary_base": 5e5})
    rope = {"rope_type": "llama3", "rope_theta": 5e5, **vars(scaling)}
    sizes = {"hidden_size": 128, "num_attention_heads": 4, "head_dim": 32, "max_position_embeddings": 4096}
    config = LlamaConfig(**sizes, rope_parameters=rope)
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    torch.testing.assert_close(model.rotary_pos_emb.inv_freq, expected)
    plain = tiny_gpt({"kv_channels": 32, "rotary_base": 5e5}).rotary_pos_emb.inv_freq
    assert not torch.allclose(expected, plain)


@pytest.mark.parametrize("kinds", [{}, {"linear_qkv"}, {"linear_qkv", "linear_proj"}, {"linear_fc1", "linear_fc2"}])
def test_exactly_the_named_linear_layers_have_biases(kinds):
    modules = tiny_gpt({"linear_biases": frozenset(kinds)}).named_modules()
    biased = {name.rpartition(".")[2] for name, module in modules if getattr(module, "bias", None) is not None}
    assert biased == set(kinds)


BLOOM = {"architecture": "bloom", "num_query_groups": 4, "position_embedding": "alibi", "normalization": "LayerNorm"}


def test_the_norm_of_the_embedding_is_saved_whole_and_layers_share_one_alibi_bias():
    model = tiny_gpt({**BLOOM, "embedding_layernorm": True})
    names = {f"embedding.word_embeddings_layernorm.{kind}" for kind in ("weight", "bias")}
    saved = [entry for entry in sharded_parameters([model], only_adapters=False) if entry.key in names]
    assert {entry.key: entry.global_shape for entry in saved} == dict.fromkeys(names, (SIZES["hidden_size"],))
    first, second = (layer.self_attention.core_attention._bias for layer in model.decoder.layers)
    assert first is second
