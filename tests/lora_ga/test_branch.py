"""What stands in for an adapter changes nothing and sums its product; layouts are in tests/training/test_layout.py."""

from __future__ import annotations

import pytest
import torch

from megatron_peft.adapters.frozen_linear import FrozenLinearCall
from megatron_peft.lora_ga.branch import LeftProduct, RightProduct
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


def test_sums_are_float32_beside_bfloat16_activations():
    branch = LeftProduct(draw("omega", WIDTH, IN).bfloat16(), OUT)
    call = FrozenLinearCall(draw("W", OUT, IN).bfloat16(), None, False, False, Place(0, 1))
    y = branch(draw("x", S, BATCH, IN).bfloat16().requires_grad_(), call)
    y.sum().backward()
    assert y.dtype == torch.bfloat16 and branch.total.dtype == torch.float32
    assert branch.total.any()
