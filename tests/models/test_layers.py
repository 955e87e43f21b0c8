"""Our norms and SwiGLU are torch's, in value and gradients, keep less and say whose gradients are partial."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from megatron_peft.models.layers import LayerNorm, RMSNorm, SwiGLU, _SwiGLU
from megatron_peft.runtime import cpu
from tests.kept import kept_for_backward
from tests.one_rank import one_rank
from tests.tiny_gpt import tiny_gpt

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
    is_rms, parameters = isinstance(norm, RMSNorm), norm.parameters()
    return (F.rms_norm if is_rms else F.layer_norm)(x, SHAPE[-1:], *parameters, EPS)


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


def test_bfloat16_is_normalized_in_float32():
    norm, x = _norm(RMSNorm, torch.bfloat16), torch.randn(SHAPE).bfloat16()
    wide = _norm(RMSNorm)
    wide.weight.data.copy_(norm.weight.data)
    found = _values_and_gradients(norm, norm, x)
    expected = _values_and_gradients(lambda x: _reference(wide, x), wide, x.float())
    for ours, reference in zip(found, expected, strict=True):
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours.float(), reference, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("kind", [RMSNorm, LayerNorm])
def test_parameters_say_whether_a_rank_sees_only_its_own_tokens(kind):
    for split in (False, True):
        norm = _norm(kind, sequence_parallel=split)
        assert all(parameter.sequence_parallel is split for parameter in norm.parameters())


@pytest.mark.parametrize("is_frozen", [True, False])
def test_the_weight_gets_a_gradient_unless_frozen_and_the_input_if_required(is_frozen):
    norm = _norm(RMSNorm).requires_grad_(not is_frozen)
    x = torch.randn(SHAPE, requires_grad=is_frozen)
    norm(x).sum().backward()
    assert (norm.weight.grad is None) is is_frozen and (x.grad is not None) is is_frozen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_output_is_recomputed_from_what_is_saved(dtype):
    y = _norm(RMSNorm, dtype)(torch.randn(SHAPE, dtype=dtype, requires_grad=True))
    assert torch.equal(y.grad_fn.recompute_output(y.grad_fn), y)


def composed(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def inputs(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(5, 3, 14, dtype=dtype, requires_grad=True), torch.randn(5, 3, 7, dtype=dtype)


@pytest.mark.parametrize("is_contiguous", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swiglus_values_and_gradients_are_the_composed_ones_bit_for_bit(dtype, is_contiguous):
    x, grad = inputs(dtype)
    if not is_contiguous:
        grad = grad.transpose(0, 2).contiguous().transpose(0, 2)
    ours, theirs = _SwiGLU.apply(x), composed(x)
    assert torch.equal(ours, theirs)
    assert torch.equal(*(torch.autograd.grad(y, x, grad)[0] for y in (ours, theirs)))


def test_swiglus_output_is_recomputed_its_gradient_is_the_same_and_only_the_input_is_saved():
    x, grad = inputs(torch.float32)
    with kept_for_backward() as kept:
        y, other = _SwiGLU.apply(x), _SwiGLU.apply(x)
    assert [tensor.data_ptr() for tensor in kept] == [x.data_ptr()] * 2
    assert torch.equal(y.grad_fn.recompute_output(y.grad_fn), y)
    assert torch.equal(*(torch.autograd.grad(out, x, grad)[0] for out in (y, other)))
    assert y.grad_fn.activated is None


def test_swiglu_is_a_module_without_state_as_newer_versions_of_megatron_core_ask():
    assert issubclass(SwiGLU, torch.nn.Module)
    with one_rank():
        activation = tiny_gpt().decoder.layers[0].mlp.activation_func
    assert isinstance(activation, SwiGLU) and not activation.state_dict()
    x, _ = inputs(torch.float32)
    assert torch.equal(activation(x), composed(x))
