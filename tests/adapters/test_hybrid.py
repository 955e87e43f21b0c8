"""The Hybrid's layers are its formula: column- and row-parallel, gradients included."""

from __future__ import annotations

import pytest
import torch

from megatron_peft.adapters.frozen_linear import FrozenLinearCall
from megatron_peft.adapters.hybrid import Hybrid
from megatron_peft.config import PeftConfig
from megatron_peft.models.swiglu import _SwiGLU
from megatron_peft.parallel.layout import LinearLayout
from megatron_peft.runtime import cpu
from tests.adapters.test_boft import Place

IN, OUT = 12, 16


def hybrid(split: str) -> Hybrid:
    cpu.install()
    peft = PeftConfig("hybrid", lora_rank=3, boft_block_size=2, boft_factors=2, hybrid_lambda="fixed:0.3")
    made = Hybrid(LinearLayout(split, OUT, IN, Place()), peft, "layer.adapter", 0, torch.float64)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return made.double()


def call_of(weight: torch.Tensor, size: int) -> FrozenLinearCall:
    """A row-parallel layer's; with `size` 2 as on one of two ranks, the other of which holds nothing."""
    return FrozenLinearCall(weight, None, False, False, Place(0, size), lambda z: z)  # type: ignore[arg-type]


@pytest.mark.parametrize(("split", "size"), [("column", 1), ("row", 1), ("row", 2)])
def test_it_is_the_formula(split, size):
    adapter = hybrid(split)
    weight = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = torch.randn(5, 2, IN, generator=torch.Generator().manual_seed(2), dtype=torch.float64, requires_grad=True)
    call = call_of(weight, size) if split == "row" else FrozenLinearCall(weight, None, False, False, Place())  # type: ignore[arg-type]
    assert call.needs_no_sum == (size == 1)
    D = torch.block_diag(*adapter.rotation.changes())
    mixed = weight + 0.3 * adapter.low_rank.delta_weight() + 0.7 * D @ weight
    direction = torch.randn(5, 2, OUT, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    trained = [x, *adapter.parameters()]
    torch.testing.assert_close(adapter(x, call), x @ mixed.T, atol=1e-6, rtol=1e-6)
    ours = torch.autograd.grad((adapter(x, call) * direction).sum(), trained)
    plain = torch.autograd.grad(((x @ mixed.T) * direction).sum(), trained)
    for mine, expected in zip(ours, plain, strict=True):
        torch.testing.assert_close(mine, expected, atol=1e-5, rtol=1e-5)


def test_it_starts_as_the_base():
    peft = PeftConfig("hybrid", lora_rank=3, boft_block_size=2, boft_factors=2)
    adapter = Hybrid(LinearLayout("column", OUT, IN, Place()), peft, "layer.adapter", 0, torch.float32)  # type: ignore[arg-type]
    weight, x = torch.randn(OUT, IN), torch.randn(5, 2, IN)
    call = FrozenLinearCall(weight, None, False, False, Place())  # type: ignore[arg-type]
    torch.testing.assert_close(adapter(x, call), x @ weight.T)
    assert float(adapter.mix) == 0.5


@pytest.mark.parametrize("size", [1, 2])
def test_a_row_parallel_layer_keeps_nothing_of_what_swiglu_gives(size):
    adapter, call = hybrid("row"), call_of(torch.randn(OUT, IN, dtype=torch.float64), size)
    h = torch.randn(5, 2, 2 * IN, generator=torch.Generator().manual_seed(2), dtype=torch.float64, requires_grad=True)
    x, kept = _SwiGLU.apply(h), set()

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.add(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = adapter(x, call)
    assert x.data_ptr() not in kept
    alone = x.detach().requires_grad_()
    direction = torch.randn(y.shape, dtype=torch.float64)
    found = torch.autograd.grad((y * direction).sum(), [h, *adapter.parameters()])
    dx, *expected = torch.autograd.grad((adapter(alone, call) * direction).sum(), [alone, *adapter.parameters()])
    assert all(torch.equal(*pair) for pair in zip(found[1:], expected, strict=True))
    assert torch.equal(found[0], torch.autograd.grad(_SwiGLU.apply(h), h, dx)[0])
