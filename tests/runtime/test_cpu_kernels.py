"""Products by oneDNN and by torch are equal; freed memory stays or returns, as the first call decides."""

import resource
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_peft.adapters import linear as adapted
from megatron_peft.rehearsal.program import Computation, Product
from megatron_peft.rehearsal.recorder import Recorder
from megatron_peft.runtime import cpu_kernels
from megatron_peft.runtime.cpu_kernels import add_linear, linear, linear_plus, outer_sum
from tests.ranks import run_ranks

S, BATCH, IN, OUT, RANK = 5, 3, 24, 40, 2
KINDS = ["onednn", "torch", torch.float64, torch.bfloat16]


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.fixture(params=KINDS, ids=str)
def dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    if request.param == "torch":
        monkeypatch.setattr(cpu_kernels, "_ONEDNN", None)
    if request.param == "onednn" and cpu_kernels._ONEDNN is None:
        pytest.skip("this torch has no oneDNN")
    return request.param if isinstance(request.param, torch.dtype) else torch.float32


def close(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    tolerance = 2e-2 if found.dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=10 * tolerance)


def test_texts_are_scored_by_torchs_own_product_and_steps_of_generation_by_ours(monkeypatch: pytest.MonkeyPatch):
    x, weight, bias = draw(S, BATCH, IN), draw(OUT, IN), draw(OUT)
    monkeypatch.setattr(adapted, "linear", lambda *args: "ours")
    assert torch.equal(adapted._alone(x, weight, bias), F.linear(x, weight, bias))
    assert adapted._alone(x[:1], weight, bias) == "ours"


INPUTS = {
    "plain": lambda: draw(S, BATCH, IN),
    "strided": lambda: draw(BATCH, S, IN).transpose(0, 1),
    "expanded": lambda: draw(1, 1, IN).expand(S, BATCH, IN),
    "one token": lambda: draw(1, 1, IN),
    "flat": lambda: draw(S, IN),
}


@pytest.mark.parametrize("kind", INPUTS)
def test_linear(dtype, kind):
    x, bias = INPUTS[kind]().to(dtype), draw(OUT).to(dtype)
    for weight in (draw(OUT, IN).to(dtype), draw(IN, OUT).to(dtype).t()):
        close(linear(x, weight), x.double() @ weight.double().t())
        close(linear(x, weight, bias), x.double() @ weight.double().t() + bias.double())


def test_tokens_in_the_order_of_samples_are_one_product():
    """What an embedding gives: [s, 1, h] with the strides of [1, s, h]."""
    x, weight = draw(1, S, IN).bfloat16().transpose(0, 1), draw(OUT, IN).bfloat16()
    with Recorder() as recorder:
        linear(x, weight)
    [work] = recorder.entries()
    assert work == Computation({Product("mm", 1, S, OUT, IN, "bfloat16"): 1}, num_kernels=1)


def test_two_products_are_added_up_and_one_in_place(dtype):
    shapes = ((S, BATCH, IN), (OUT, IN), (S, BATCH, RANK), (OUT, RANK), (OUT,))
    x, weight, u, narrow, bias = (draw(*shape).to(dtype) for shape in shapes)
    expected = x.double() @ weight.double().t() + u.double() @ narrow.double().t()
    close(linear_plus(x, weight, u, narrow), expected)
    close(linear_plus(x, weight, u, narrow, bias), expected + bias.double())
    y = draw(S, BATCH, OUT).to(dtype)
    expected = y.double() + x.double() @ weight.double().t()
    assert add_linear(y, x, weight) is y
    close(y, expected)


@pytest.mark.parametrize("kind", INPUTS)
def test_the_sum_over_tokens(dtype, kind):
    x = INPUTS[kind]().to(dtype)
    grad = draw(*x.shape[:-1], RANK).to(dtype)
    close(outer_sum(grad, x), grad.double().reshape(-1, RANK).t() @ x.double().reshape(-1, IN))


def test_no_tokens_give_no_output_and_a_sum_of_zero(dtype):
    x, weight = draw(0, BATCH, IN).to(dtype), draw(OUT, IN).to(dtype)
    assert linear(x, weight).shape == (0, BATCH, OUT)
    assert torch.equal(outer_sum(draw(0, BATCH, RANK).to(dtype), x), torch.zeros(RANK, IN, dtype=dtype))


PAGES = 64 * 2**10
CALLS = {  # -> whether a second step pays for its pages again
    "keep_freed_memory()": False,
    "give_back_freed_memory()": True,
    "give_back_freed_memory(); keep_freed_memory()": True,
}


def new_pages(calls: str) -> list[int]:
    """Of two steps of a new process, each 64 blocks of 4 MiB."""
    exec(calls, vars(cpu_kernels))
    found = []
    for _ in range(2):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        blocks = [torch.ones(2**20) for _ in range(64)]
        del blocks
        found.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return found


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's")
@pytest.mark.parametrize(("calls", "pays_again"), CALLS.items())
def test_a_second_step_faults_pages_in_only_if_they_were_returned(calls: str, pays_again: bool) -> None:
    [(first, second)] = run_ranks(1, new_pages, calls)
    assert first > 0.99 * PAGES and (second > PAGES // 2) is pays_again, (first, second)
