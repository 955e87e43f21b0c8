"""Which layers are adapted and by what, what stays frozen, and the messages for names that match nothing."""

import re
from importlib import import_module

import pytest
import torch

from megatron_peft.adapters import low_rank
from megatron_peft.adapters.attach import attach_adapters, huggingface_modules
from megatron_peft.adapters.hybrid import Hybrid
from megatron_peft.config import LINEAR_MODULES, ConfigurationError, PeftConfig, is_targeted, require_matches
from megatron_peft.models.families import FAMILIES, family_of
from megatron_peft.parallel.layout import LinearLayout
from megatron_peft.runtime import cpu
from tests.one_rank import Place, one_rank
from tests.tiny_gpt import tiny_gpt

NAMES = [
    f"decoder.layers.{layer}.{module}"
    for layer in (0, 1)
    for module in ("self_attention.linear_proj", "self_attention.linear_qkv", "mlp.linear_fc1", "mlp.linear_fc2")
]
LLAMA, BLOOM = (family_of(family).modules for family in ("llama", "bloom"))


@pytest.fixture(scope="module", autouse=True)
def world():
    with one_rank():
        yield


def _targeted(*patterns, modules=LLAMA):
    return [name for name in NAMES if is_targeted(name, patterns, modules)]


MODULES = {  # in Llama's names and in Bloom's
    "self_attention.linear_qkv": ("linear_qkv q_proj v_proj", "linear_qkv query_key_value"),
    "self_attention.linear_proj": ("o_proj", "dense"),
    "mlp.linear_fc1": ("up_proj", "dense_h_to_4h"),
    "mlp.linear_fc2": ("down_proj", "dense_4h_to_h"),
}


def test_module_names_full_names_wildcards_and_unions():
    for expected, names in MODULES.items():
        for modules, patterns in zip((LLAMA, BLOOM), names, strict=True):
            for pattern in patterns.split():
                assert _targeted(pattern, modules=modules) == [f"decoder.layers.{layer}.{expected}" for layer in (0, 1)]
    assert _targeted("decoder.layers.1.mlp.linear_fc2") == ["decoder.layers.1.mlp.linear_fc2"]
    assert _targeted("decoder.layers.0.*") == NAMES[:4]
    assert _targeted("linear_fc?") == _targeted("*.linear_fc[12]") == NAMES[2:4] + NAMES[6:]
    assert _targeted("linear") == []
    assert _targeted("[qkv]_proj") == _targeted("linear_qkv") and _targeted("*_proj") == NAMES
    assert set(_targeted("linear_qkv", "down_proj")) == {*_targeted("linear_qkv"), *_targeted("down_proj")}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_knows_the_names_of_its_family(family):
    model = tiny_gpt({"architecture": family})
    assert huggingface_modules([model]) == family_of(family).modules
    assert set(family_of(family).modules.values()) == set(LINEAR_MODULES)


@pytest.mark.parametrize(
    ("modules", "patterns", "unmatched"),
    [
        (LLAMA, "dense", "dense"),
        (BLOOM, "q_proj", "q_proj"),
        (LLAMA, "linear_qkv query linear_fc9", "query linear_fc9"),
    ],
)
def test_patterns_that_match_nothing_are_answered_with_what_exists(modules, patterns, unmatched):
    with pytest.raises(ConfigurationError) as error:
        require_matches(patterns.split(), NAMES, modules)
    told = str(error.value)
    assert told.startswith(f"--peft-target-modules {unmatched} matches no linear layer.")
    assert f"(Hugging Face: {', '.join(modules)})" in told and all(name in told for name in (*LINEAR_MODULES, NAMES[0]))
    assert len(re.findall(r"\blinear_fc1\b,", told)) == 1


def _attached(model, *targets):
    return attach_adapters([model], PeftConfig(target_modules=targets or LINEAR_MODULES, lora_rank=4), seed=1)


def _run(model):
    tokens = torch.arange(24).reshape(2, 12)
    return model(tokens, torch.arange(12).expand(2, 12), None, labels=tokens + 1)


def test_only_adapters_of_targeted_layers_are_trained_and_a_wrong_target_changes_nothing():
    model, expected = tiny_gpt(), {NAMES[1], NAMES[5], NAMES[7]}
    with pytest.raises(ConfigurationError, match="--peft-target-modules nothing"):
        _attached(model, "nothing")
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert set(_attached(model, "q_proj", "*.1.mlp.linear_fc2")) == expected
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {f"{name}.adapter.{factor}" for name in expected for factor in "AB"}


def test_adapters_start_from_their_global_names():
    first, second = tiny_gpt(), tiny_gpt()
    assert sorted(_attached(first)) == sorted(NAMES)
    _attached(second, "linear_fc2")
    layers = [model.decoder.layers[1].mlp.linear_fc2.adapter.A for model in (first, second)]
    assert torch.equal(*layers)
    assert not torch.equal(layers[0], first.decoder.layers[0].mlp.linear_fc2.adapter.A)


def test_what_layers_share_is_made_once_for_each_type(monkeypatch):
    model, made = tiny_gpt(), []
    model.decoder.layers[1].mlp.linear_fc2.double()
    monkeypatch.setattr(low_rank.LowRank, "bind_shared", lambda self, shared: made.append(shared), raising=False)
    monkeypatch.setattr(low_rank, "share", lambda layouts, peft, seed, dtype: (len(layouts), dtype), raising=False)
    _attached(model, "linear_fc2")
    assert made == [(1, torch.float32), (1, torch.float64)]
    types = [layer.mlp.linear_fc2.adapter.A.dtype for layer in model.decoder.layers]
    assert types == [torch.float32, torch.float64]


ONE_LAYER = {"recompute_granularity": "full", "recompute_num_layers": 1}
RECOMPUTE = {
    "full": {**ONE_LAYER, "recompute_method": "uniform"},
    "block": {**ONE_LAYER, "recompute_method": "block"},
    "selective": {"recompute_granularity": "selective"},
}


def _gradients(recompute):
    model = tiny_gpt(transformer=recompute)
    _attached(model)
    for name, parameter in model.named_parameters():
        if name.endswith("adapter.B"):
            parameter.data.fill_(0.01)
    _run(model).sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("kind", RECOMPUTE)
def test_recompute_behind_a_frozen_embedding_keeps_every_gradient(kind):
    expected, found = _gradients({}), _gradients(RECOMPUTE[kind])
    assert len(found) == 16
    for name, gradient in found.items():
        assert gradient is not None and gradient.abs().max() > 1e-4, name
        torch.testing.assert_close(gradient, expected[name], msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(("targets", "layer"), [(LINEAR_MODULES, True), (("decoder.layers.1.*",), False)])
def test_backward_ends_at_the_first_adapter(targets, layer):
    model, needs = tiny_gpt(), {}
    _attached(model, *targets)
    model.embedding.register_forward_hook(lambda *call: needs.update(embedding=call[-1].requires_grad))
    model.decoder.layers[0].register_forward_hook(lambda *call: needs.update(layer=call[-1][0].requires_grad))
    _run(model)
    assert needs == {"embedding": False, "layer": layer}


def test_a_stage_without_an_adapter_has_an_output_to_go_back_from():
    first, last = tiny_gpt(), tiny_gpt()
    last.decoder.layers[0].layer_number, last.decoder.layers[1].layer_number = 3, 4
    attach_adapters([first, last], PeftConfig(lora_rank=4, target_modules=("decoder.layers.3.*",)), seed=1)
    assert _run(first).requires_grad
    assert [n for n, p in first.named_parameters() if p.requires_grad] == []


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("lora", {}),
        ("lora-ga", {"lora_ga_init": "paper"}),
        ("boft", {"boft_block_size": 4, "boft_factors": 2}),
        ("boft", {"boft_block_size": 4, "boft_factors": 2, "rotation_side": "input"}),
        ("boft", {"boft_block_size": 4, "boft_factors": 2, "boft_parametrization": "projection"}),
        ("urnn", {"urnn_block_size": 8}),
        ("urnn", {"urnn_block_size": 8, "urnn_update": "riemannian", "rotation_side": "input"}),
        ("hybrid", {"boft_block_size": 4, "boft_factors": 2}),
        ("hybrid", {"hybrid_rotation": "urnn", "urnn_block_size": 8}),
    ],
)
def test_the_declared_cost_is_what_is_trained(method, settings):
    peft, layout = PeftConfig(method, lora_rank=4, **settings), LinearLayout("column", 48, 32, Place(0, 1))
    cpu.install()
    adapter = import_module(peft.spec.adapter).build(layout, peft, "layer.adapter", 0, torch.float32)
    numbers = sum(parameter.numel() for parameter in adapter.parameters() if parameter.requires_grad)
    assert numbers == peft.spec.num_parameters(peft, 48, 32)


def test_a_method_that_starts_from_weights_is_refused_on_a_quantized_base_unless_it_says_that_it_can(monkeypatch):
    wide = {"hidden_size": 64, "ffn_hidden_size": 64, "kv_channels": 16}
    peft = PeftConfig(method="hybrid", lora_rank=4, boft_block_size=4, boft_factors=2)
    attach_adapters([tiny_gpt(wide, base_precision="fp8")], peft, 0)
    monkeypatch.delattr(Hybrid, "takes_quantized_weight")
    attach_adapters([tiny_gpt(wide)], peft, 0)
    with pytest.raises(ConfigurationError, match="--peft-method hybrid starts from .* --base-precision .* leave that"):
        attach_adapters([tiny_gpt(wide, base_precision="fp8")], peft, 0)
