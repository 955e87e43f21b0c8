"""SwiGLU in one function: the composed one's numbers, and less kept."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megatron_peft.models.swiglu import SwiGLU, _SwiGLU
from tests.one_rank import one_rank
from tests.tiny_gpt import tiny_gpt


def composed(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def inputs(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(5, 3, 14, dtype=dtype, requires_grad=True), torch.randn(5, 3, 7, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients_are_the_composed_ones_bit_for_bit(dtype):
    x, grad = inputs(dtype)
    ours, theirs = _SwiGLU.apply(x), composed(x)
    assert torch.equal(ours, theirs)
    assert torch.equal(*(torch.autograd.grad(y, x, grad)[0] for y in (ours, theirs)))


def test_gradcheck():
    x, _ = inputs(torch.float64)
    assert torch.autograd.gradcheck(_SwiGLU.apply, (x,))


def test_a_gradient_that_is_not_contiguous():
    x, _ = inputs(torch.float64)
    grad = torch.randn(7, 3, 5, dtype=torch.float64).transpose(0, 2)
    assert torch.equal(*(torch.autograd.grad(f(x), x, grad)[0] for f in (_SwiGLU.apply, composed)))


def test_only_the_input_is_kept():
    x, _ = inputs(torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        _SwiGLU.apply(x)
    assert [t.data_ptr() for t in kept] == [x.data_ptr()]


def test_the_output_can_be_made_again_of_what_is_kept():
    y = _SwiGLU.apply(inputs(torch.float32)[0])
    assert torch.equal(y.grad_fn.make_again(y.grad_fn), y)


def test_the_gradient_after_making_again_is_the_same_and_nothing_more_stays_kept():
    x, grad = inputs(torch.float32)
    y, other = _SwiGLU.apply(x), _SwiGLU.apply(x)
    y.grad_fn.make_again(y.grad_fn)
    assert torch.equal(*(torch.autograd.grad(out, x, grad)[0] for out in (y, other)))
    assert y.grad_fn.activated is None


def test_it_is_a_module_without_state_as_newer_versions_of_megatron_core_ask():
    assert issubclass(SwiGLU, torch.nn.Module)
    with one_rank():
        activation = tiny_gpt().decoder.layers[0].mlp.activation_func
    assert isinstance(activation, SwiGLU) and not activation.state_dict()
    x, _ = inputs(torch.float32)
    assert torch.equal(activation(x), composed(x))
