"""Our norms are torch's, in value and in gradients, and say whether their gradients are partial."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from megatron_peft.models.norms import LayerNorm, RMSNorm
from megatron_peft.runtime import cpu

SHAPE, EPS = (5, 2, 8), 1e-3


@pytest.fixture(scope="module", autouse=True)
def installed():
    cpu.install()


def _norm(kind, dtype=torch.float32, sequence_parallel=False):
    config = SimpleNamespace(params_dtype=dtype, sequence_parallel=sequence_parallel)
    norm = kind(config, SHAPE[-1], EPS)
    for parameter in norm.parameters():
        parameter.data.uniform_(0.5, 1.5)
    return norm


def _reference(norm, x):
    if isinstance(norm, RMSNorm):
        return F.rms_norm(x, SHAPE[-1:], norm.weight, EPS)
    return F.layer_norm(x, SHAPE[-1:], norm.weight, norm.bias, EPS)


def _values_and_gradients(forward, norm, x):
    leaf = x.clone().requires_grad_()
    y = forward(leaf)
    y.backward(torch.linspace(-1, 1, y.numel()).reshape(y.shape).to(y.dtype))
    gradients = [leaf.grad, *(parameter.grad for parameter in norm.parameters())]
    norm.zero_grad()
    return [y.detach(), *gradients]


@pytest.mark.parametrize("kind", [RMSNorm, LayerNorm])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_and_gradients_are_torchs(kind, dtype):
    norm, x = _norm(kind, dtype), torch.randn(SHAPE, dtype=dtype)
    expected = _values_and_gradients(lambda x: _reference(norm, x), norm, x)
    torch.testing.assert_close(_values_and_gradients(norm, norm, x), expected)


def test_rms_gradients_are_those_of_finite_differences():
    norm = _norm(RMSNorm, torch.float64)
    assert torch.autograd.gradcheck(norm, torch.randn(SHAPE, dtype=torch.float64, requires_grad=True))


def test_bfloat16_is_normalised_in_float32():
    norm, x = _norm(RMSNorm, torch.bfloat16), torch.randn(SHAPE).bfloat16()
    wide = _norm(RMSNorm)
    wide.weight.data.copy_(norm.weight.data)
    found = _values_and_gradients(norm, norm, x)
    expected = _values_and_gradients(lambda x: _reference(wide, x), wide, x.float())
    for ours, reference in zip(found, expected, strict=True):
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours.float(), reference, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("kind", [RMSNorm, LayerNorm])
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_parameters_say_whether_a_rank_sees_only_its_own_tokens(kind, sequence_parallel):
    norm = _norm(kind, sequence_parallel=sequence_parallel)
    assert all(parameter.sequence_parallel is sequence_parallel for parameter in norm.parameters())


def test_a_frozen_norm_computes_no_gradient_of_its_weight():
    norm = _norm(RMSNorm).requires_grad_(False)
    x = torch.randn(SHAPE, requires_grad=True)
    norm(x).sum().backward()
    assert norm.weight.grad is None and x.grad is not None


def test_a_trainable_norm_behind_frozen_layers_gets_its_gradient():
    norm = _norm(RMSNorm)
    norm(torch.randn(SHAPE)).sum().backward()
    assert norm.weight.grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_output_can_be_made_again_of_what_is_kept(dtype):
    y = _norm(RMSNorm, dtype)(torch.randn(SHAPE, dtype=dtype, requires_grad=True))
    assert torch.equal(y.grad_fn.make_again(y.grad_fn), y)
