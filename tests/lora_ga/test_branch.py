"""What stands in for an adapter changes nothing and sums its product; layouts are in tests/training/test_layout.py."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region

from megatron_peft.adapters.frozen_linear import FrozenLinearCall
from megatron_peft.lora_ga.branch import LeftProduct, RightProduct
from megatron_peft.models.norms import RMSNorm
from megatron_peft.models.swiglu import _SwiGLU
from megatron_peft.runtime import cpu
from tests.one_rank import Place

S, BATCH, IN, OUT, WIDTH = 5, 3, 12, 8, 4


def draw(name: str, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(map(ord, name))))


@pytest.mark.parametrize("kind", [LeftProduct, RightProduct])
def test_passes_add_up_a_narrow_product_of_the_gradient(kind):
    weight, omega, Q = draw("W", OUT, IN), draw("omega", WIDTH, IN), draw("Q", OUT, WIDTH)
    branch = LeftProduct(omega, OUT) if kind is LeftProduct else RightProduct(Q, IN)
    call = FrozenLinearCall(weight, None, False, False, Place(0, 1))
    G = torch.zeros(OUT, IN)
    for microbatch in ("first", "second"):
        x, dy = draw(microbatch, S, BATCH, IN).requires_grad_(), draw(f"d {microbatch}", S, BATCH, OUT)
        y = branch(x, call)
        y.backward(dy)
        torch.testing.assert_close(y, x @ weight.T)
        torch.testing.assert_close(x.grad, dy @ weight)
        G += dy.flatten(0, 1).T @ x.detach().flatten(0, 1)
    expected = (G @ omega.T).T if kind is LeftProduct else Q.T @ G
    torch.testing.assert_close(branch.total, expected, atol=1e-4, rtol=1e-4)


def normed(h: torch.Tensor) -> torch.Tensor:
    """Twice IN features, normed and taken through the entrance of a column-parallel layer of one rank."""
    cpu.install()
    norm = RMSNorm(SimpleNamespace(params_dtype=torch.float32, sequence_parallel=False), h.shape[-1])  # type: ignore[arg-type]
    norm.weight.data.copy_(draw("norm", h.shape[-1]))
    return copy_to_tensor_model_parallel_region(norm(h), Place(0, 1))


@pytest.mark.parametrize("make", [_SwiGLU.apply, normed, torch.tanh])
@pytest.mark.parametrize("kind", [LeftProduct, RightProduct])
def test_an_input_that_can_be_made_again_is_not_kept(kind, make):
    h, dy = draw("h", S, BATCH, 2 * IN).requires_grad_(), draw("dy", S, BATCH, OUT)
    x = make(h)
    weight, omega, Q = draw("W", OUT, x.shape[-1]), draw("omega", WIDTH, x.shape[-1]), draw("Q", OUT, WIDTH)
    branch = LeftProduct(omega, OUT) if kind is LeftProduct else RightProduct(Q, x.shape[-1])
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        y = branch(x, FrozenLinearCall(weight, None, False, False, Place(0, 1)))
    assert len([t for t in kept if t.shape == x.shape]) == (make is torch.tanh)
    torch.autograd.grad(y, x, dy)
    G = dy.flatten(0, 1).T @ x.detach().flatten(0, 1)
    torch.testing.assert_close(branch.total, omega @ G.T if kind is LeftProduct else Q.T @ G, atol=1e-4, rtol=1e-4)


def test_sums_are_float32_beside_bfloat16_activations():
    branch = LeftProduct(draw("omega", WIDTH, IN).bfloat16(), OUT)
    call = FrozenLinearCall(draw("W", OUT, IN).bfloat16(), None, False, False, Place(0, 1))
    y = branch(draw("x", S, BATCH, IN).bfloat16().requires_grad_(), call)
    y.sum().backward()
    assert y.dtype == torch.bfloat16 and branch.total.dtype == torch.float32
    assert branch.total.any()
