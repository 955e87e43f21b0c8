"""A quantized weight has the library's codes, takes the bytes that are promised, and is dense for a product only."""

import weakref
from contextlib import nullcontext
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_peft.adapters.frozen_linear import FrozenLinearCall, frozen_linear
from megatron_peft.adapters.hybrid import frozen_linear_mixed
from megatron_peft.adapters.low_rank_linear import frozen_linear_plus_low_rank
from megatron_peft.adapters.quantized_weight import QuantizedWeight, dense, stored_tensors
from megatron_peft.adapters.rotated_linear import frozen_linear_rotated
from megatron_peft.runtime import cpu
from tests.adapters.many_ranks import TensorParallelPlace as Place


@pytest.fixture(autouse=True)
def device():
    cpu.install()


OUT, IN, TOKENS, RANK, GROUP = 96, 128, 160, 4, 8


def quantized(values: torch.Tensor, precision: str, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    weight = nn.Parameter(torch.empty(values.shape, dtype=dtype, device="meta"), requires_grad=False)
    weight.quantized = QuantizedWeight(precision, values.shape, dtype)  # pyright: ignore[reportAttributeAccessIssue]
    for rows in (slice(0, 5), slice(5, len(values))):
        weight.quantized.fill_rows(rows, values[rows])
    return weight


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nf4_is_that_of_bitsandbytes(dtype):
    values = draw(OUT, IN)
    codes, state = bnb.quantize_4bit(values, blocksize=64, quant_type="nf4")
    state.dtype = dtype
    weight = quantized(values, "nf4", dtype)
    assert torch.equal(weight.quantized.codes.flatten(), codes.flatten())
    assert torch.equal(dense(weight), bnb.dequantize_4bit(codes, state)) and dense(weight).dtype == dtype


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 2.0**-4), (torch.bfloat16, 2.0**-4 + 2.0**-8)])
def test_fp8_rounds_each_number_to_its_four_bits_at_the_scale_of_its_block(dtype, rounding):
    values = draw(OUT, IN) * torch.logspace(-3, 3, OUT)[:, None]
    values[3, :64] = 0
    found = dense(quantized(values, "fp8", dtype)).float()
    smallest = values.view(OUT, -1, 64).abs().amax(-1).div(448).mul(2.0**-6).repeat_interleave(64, 1)  # not subnormal
    error = (found - values).abs() / values.abs().clamp(min=1e-30)
    assert error[values.abs() > smallest].max() <= rounding and not found[3, :64].any()


@pytest.mark.parametrize(("precision", "most"), [("nf4", 0.285), ("fp8", 0.535)])
def test_bytes_over_those_in_bf16(precision, most):
    held = stored_tensors(quantized(draw(OUT, IN), precision, torch.bfloat16))
    assert len(held) == 2 and sum(tensor.nbytes for tensor in held) / (OUT * IN * 2) <= most


def test_fp8_codes_of_a_small_matrix():
    """The largest of a block has the largest code, 448; 3.5 times it is 1568. Between 208 and 224 stands no number.

    The blocks of a row have a scale each.
    """
    block = torch.zeros(64)
    block[:5] = torch.tensor([1568.0, -784.0, 3.5, 740.0, -760.0])
    wide = quantized(torch.stack([torch.cat([block, block / 7, 2 * block])] * 6), "fp8").quantized
    assert wide.scales.tolist() == [[3.5, 0.5, 7.0]] * 6 and torch.equal(*wide.codes.float().split(64, 1)[:2])
    weight = quantized(torch.stack([block, -block / 7] * 3), "fp8")
    codes = weight.quantized.codes.float()
    assert codes[0, :5].tolist() == [448.0, -224.0, 1.0, 208.0, -224.0]
    assert all(torch.equal(row, codes[0] * (-1) ** at) for at, row in enumerate(codes)) and not codes[:, 5:].any()
    assert weight.quantized.scales.flatten().tolist() == [3.5, 0.5] * 3


class DividesLikeCUDA(TorchDispatchMode):
    """Divide by a Python number as CUDA does: multiply by its reciprocal in the tensor's type."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.div.Tensor and not isinstance(args[1], torch.Tensor):
            return args[0] * torch.tensor(args[1], dtype=args[0].dtype).reciprocal()
        return func(*args, **(kwargs or {}))


@pytest.mark.gpu("precision")
def test_fp8_scales_and_codes_are_the_same_on_every_device(figure):
    values = draw(OUT, IN)
    on_cpu = QuantizedWeight("fp8", values.shape, torch.bfloat16, "cpu")
    on_cpu.fill_rows(slice(None), values)
    with nullcontext() if torch.cuda.is_available() else DividesLikeCUDA():
        assert torch.cuda.is_available() or not torch.equal(draw(OUT) / 448, draw(OUT) / torch.full((), 448.0))
        here = quantized(values, "fp8", torch.bfloat16).quantized
    for name in ("scales", "codes"):
        num_different = (getattr(here, name).float().cpu() != getattr(on_cpu, name).float()).sum()
        figure(f"fp8: {name} unlike the CPU's", float(num_different), 0.0)


D = draw(OUT // GROUP, GROUP, GROUP) * 0.05
PRODUCTS = {
    "frozen": lambda x, call: frozen_linear(x, call),
    "low rank": lambda x, call: frozen_linear_plus_low_rank(x, draw(RANK, IN), draw(OUT, RANK), 0.5, call),
    "rotated": lambda x, call: frozen_linear_rotated(x, D, call),
    "mixed": lambda x, call: frozen_linear_mixed(x, draw(RANK, IN), draw(OUT, RANK), D, torch.tensor(0.5), call),
}


@pytest.mark.parametrize("num_tokens", [TOKENS, 20], ids=["weight turned", "activations turned"])
@pytest.mark.parametrize("product", PRODUCTS)
def test_products_are_those_of_the_dense_matrix_which_nobody_keeps(product, num_tokens):
    x, weight, saved = draw(num_tokens, 1, IN).requires_grad_(), quantized(draw(OUT, IN), "nf4"), []
    found = []
    for stored in (weight, dense(weight)):
        call = FrozenLinearCall(stored, None, True, False, Place(0, 1))
        with torch.autograd.graph.saved_tensors_hooks(lambda kept: saved.append(kept.shape) or kept, lambda kept: kept):
            y = PRODUCTS[product](x, call)
        found.append((y, *torch.autograd.grad(y.square().sum(), x)))
    assert all(map(torch.equal, *found))
    assert weight.shape not in saved


@pytest.mark.parametrize("product", PRODUCTS)
def test_no_dense_matrix_lives_between_forward_and_backward_nor_after_it(product, monkeypatch):
    """Whoever keeps it, a graph, its context or the weight."""
    made: list[weakref.ref[torch.Tensor]] = []

    def remembered(weight: QuantizedWeight, *rows: slice) -> torch.Tensor:
        matrix = plain(weight, *rows)
        made.append(weakref.ref(matrix))
        return matrix

    plain = QuantizedWeight.dense
    monkeypatch.setattr(QuantizedWeight, "dense", remembered)
    x, weight = draw(TOKENS, 1, IN).requires_grad_(), quantized(draw(OUT, IN), "nf4")
    y = PRODUCTS[product](x, FrozenLinearCall(weight, None, True, False, Place(0, 1)))
    assert made and all(matrix() is None for matrix in made)
    y.square().sum().backward()
    assert len(made) > 1 and all(matrix() is None for matrix in made)
