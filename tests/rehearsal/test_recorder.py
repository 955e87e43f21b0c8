"""What a recorder counts of operations: what a GPU would compute, read and write, in as many launches."""

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import _CopyToModelParallelRegion
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_peft.adapters.frozen_linear import run_function
from megatron_peft.adapters.quantized_weight import QuantizedWeight, stored_tensors
from megatron_peft.benchmarks.steps import num_elements
from megatron_peft.config import ConfigurationError
from megatron_peft.models import layers
from megatron_peft.rehearsal.program import Call, Computation, EarlyUse, Product
from megatron_peft.rehearsal.recorder import LiveMemory, Recorder
from megatron_peft.rehearsal.rehearsed_rank import fused_kernels
from megatron_peft.runtime.cpu_kernels import RootMeanSquareNorm, add_outer_sums, outer_sum
from megatron_peft.runtime.fake_ranks import watched_kernels

TOKENS, OUT, INTO, GROUPS, G = 300, 6, 8, 3, 4


def counted(function: Callable[[], Any]) -> Computation:
    recorder = Recorder()
    with watched_kernels(recorder.one_kernel), recorder:
        function()
    [work] = recorder.entries()
    assert isinstance(work, Computation)
    return work


def test_what_is_only_written_is_not_read():
    x = torch.zeros(TOKENS)
    assert counted(x.zero_) == Computation(num_bytes=4 * TOKENS, num_kernels=1)
    assert counted(lambda: x.copy_(torch.ones(1).expand(TOKENS))).num_bytes == 4 + 4 + 4 * TOKENS
    assert counted(lambda: x.mul_(2)) == Computation(num_bytes=8 * TOKENS, num_kernels=1)


def test_an_embedding_reads_the_rows_that_it_gives():
    table, ids = torch.zeros(1000, INTO), torch.zeros(TOKENS, dtype=torch.int64)
    assert counted(lambda: F.embedding(ids, table)).num_bytes == 8 * TOKENS + 2 * 4 * TOKENS * INTO


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_in_float32_is_one_product_in_the_type_of_its_factors(dtype):
    grad, x = torch.zeros(TOKENS, OUT, dtype=dtype), torch.zeros(TOKENS, INTO, dtype=dtype)
    name = str(dtype).removeprefix("torch.")
    product = {Product("mm", 1, OUT, INTO, TOKENS, name): 1}
    assert counted(lambda: outer_sum(grad, x, torch.float32)) == Computation(product, num_kernels=1)


def test_a_call_that_rehearsals_do_not_know_is_an_error_not_left_out():
    with Recorder(), pytest.raises(ConfigurationError, match="_c10d_functional.all_reduce, .* do not know"):
        torch.ops._c10d_functional.all_reduce(torch.ones(2), "sum", "0")


def test_a_sum_in_chunks_of_tokens_is_one_product():
    total = torch.zeros(GROUPS, G, G)
    grad, x = torch.zeros(GROUPS, G, TOKENS).bfloat16(), torch.zeros(GROUPS, TOKENS, G).bfloat16()
    product = {Product("mm", GROUPS, G, G, TOKENS, "bfloat16"): 1}
    assert counted(lambda: add_outer_sums(total, grad, x)) == Computation(product, num_kernels=1)


def test_a_norm_reads_and_writes_once_each_way():
    x = torch.zeros(TOKENS, INTO, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.ones(INTO, dtype=torch.bfloat16)
    grad = torch.ones_like(x)
    saved = 4 * TOKENS  # 1 / sqrt(...) of each token
    forward = counted(lambda: run_function(RootMeanSquareNorm, x, weight, 1e-5))
    assert forward == Computation(num_bytes=2 * 2 * TOKENS * INTO + 2 * INTO + saved, num_kernels=1)
    y = run_function(RootMeanSquareNorm, x, weight, 1e-5)
    backward = counted(lambda: torch.autograd.grad(y, x, grad))
    assert backward == Computation(num_bytes=3 * 2 * TOKENS * INTO + 2 * INTO + saved, num_kernels=1)


def test_adam_is_one_kernel_of_all_parameters():
    parameters = [torch.zeros(100, requires_grad=True), torch.zeros(20, requires_grad=True)]
    optimizer = torch.optim.AdamW(parameters, foreach=False)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()  # makes the moments
    work = counted(optimizer.step)
    assert work.num_bytes == 7 * 4 * 120, "parameter, gradient and two moments are read, all but the gradient written"
    assert work.num_kernels == 1


def test_fused_rotary_embeddings_and_swiglu_read_and_write_once_each_way():
    fuses = {"apply_rope_fusion": True, "bias_activation_fusion": True}
    recorder = Recorder()
    x = torch.zeros(TOKENS, 1, 2, INTO, requires_grad=True)
    cos, sin = (torch.zeros(TOKENS, 1, 1, INTO) for _ in range(2))
    both = torch.randn(TOKENS, 1, 2 * INTO, requires_grad=True)
    ones, ones_x = torch.ones(TOKENS, 1, INTO), torch.ones_like(x)
    usual = torch.autograd.grad(layers._SwiGLU.apply(both), both, ones)[0]
    turned = layers._rotate(x + 1, cos + 0.5, sin + 0.25)
    turned_back = torch.autograd.grad(turned, x, ones_x)[0]
    with fused_kernels(recorder.one_kernel, fuses):
        with recorder:
            torch.autograd.grad(layers._rotate(x, cos, sin), x, ones_x)
            torch.autograd.grad(layers._SwiGLU.apply(both), both, ones)
        [work] = recorder.entries()
        assert torch.equal(torch.autograd.grad(layers._SwiGLU.apply(both), both, ones)[0], usual)
        y = layers._rotate(x + 1, cos + 0.5, sin + 0.25)
        assert torch.equal(y, turned) and torch.allclose(torch.autograd.grad(y, x, ones_x)[0], turned_back)
    rotated, angles, swiglu = 4 * TOKENS * 2 * INTO, 2 * TOKENS * INTO, 8 * TOKENS * INTO
    assert work == Computation(num_bytes=4 * (rotated + 2 * angles + swiglu), num_kernels=4)


def test_a_gradient_is_added_to_its_buffer_within_the_product_where_that_is_fused():
    grad, x, buffer = torch.zeros(TOKENS, OUT), torch.zeros(TOKENS, INTO), torch.zeros(2, OUT, INTO)
    products = {Product("mm", 1, OUT, INTO, TOKENS, "float32"): 1}
    for fuses_sums, num_bytes, num_kernels in ((True, 0, 1), (False, 3 * 4 * OUT * INTO, 2)):
        recorder = Recorder(fuses_sums=fuses_sums)
        with recorder:
            buffer[1].add_(torch.mm(grad.t(), x))
        assert recorder.entries() == (Computation(products, num_bytes, num_kernels),)


def test_what_is_added_where_a_product_was_before_is_an_operation_of_its_own():
    """A storage may have the address of one that has gone."""
    grad, x, buffer = torch.zeros(TOKENS, OUT), torch.zeros(TOKENS, INTO), torch.zeros(2, OUT, INTO)
    recorder = Recorder(fuses_sums=True)
    with recorder:
        for _ in range(20):
            torch.mm(grad.t(), x)
            buffer[1].add_(torch.ones(OUT, INTO))
    [work] = recorder.entries()
    assert isinstance(work, Computation) and work.num_kernels == 60


def test_what_overlaps_the_result_of_a_call_under_way_is_used_early_and_a_view_of_it_is_not():
    recorder = Recorder(keeps_work=False)
    buffer = torch.zeros(8)
    with recorder:
        recorder._under_way[0] = SimpleNamespace(writes=[buffer[2:4]])  # type: ignore[assignment]
        buffer[4:].add_(1)
        buffer[:2].add_(1)
        _ = buffer[2:4].view(1, 2), torch.empty_like(buffer)
        assert recorder.entries() == ()
        _ = buffer[3:6] + 1
    assert recorder.entries() == (EarlyUse(0),)


@pytest.fixture
def pair() -> Iterator[dist.ProcessGroup]:
    """torch's fake process group, of two ranks."""
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield dist.group.WORLD
    dist.destroy_process_group()


def calls_of(recorder: Recorder) -> list[Call]:
    return [entry for entry in recorder.entries() if isinstance(entry, Call)]


def test_a_calls_elements_are_those_of_the_whole_tensor(pair):
    whole, part = torch.zeros(8, 4), torch.zeros(4, 4)
    with Recorder(keeps_work=False) as recorder:
        dist.all_gather_into_tensor(whole, part, group=pair)
        dist.reduce_scatter_tensor(part, whole, group=pair)
        dist.all_reduce(part, group=pair)
    found = {call.operation: (num_elements(call), call.shapes) for call in calls_of(recorder)}
    gathered, scattered, summed = (32, ((4, 4),)), (32, ((8, 4),)), (16, ((4, 4),))
    assert found == {"all_gather": gathered, "reduce_scatter": scattered, "all_reduce": summed}


def test_asynchronous_calls_and_those_of_a_backward_pass_count_once_and_those_of_one_rank_not(pair):
    y = _CopyToModelParallelRegion.apply(torch.ones(4, 4, requires_grad=True), pair).sum()
    with Recorder(keeps_work=False) as recorder:
        work: Any = dist.all_reduce(torch.zeros(16), group=pair, async_op=True)
        work.wait()
        assert len(calls_of(recorder)) == 1
        y.backward()
        dist.all_reduce(torch.zeros(16), group=dist.new_group([0]))
    assert len(calls_of(recorder)) == 2


def test_the_parameter_of_a_quantized_weight_takes_no_memory_and_its_form_does():
    weight: Any = torch.nn.Parameter(torch.empty(8, 128, device="meta"), requires_grad=False)
    weight.quantized, memory = QuantizedWeight("fp8", (8, 128), torch.float32, "cpu"), LiveMemory()
    memory.assign("weights", [weight])
    assert memory.total == 0
    memory.assign("weights", stored_tensors(weight))
    assert memory.total == 8 * 128 + 8 * 2 * 4
