"""megatron-core's CUDA calls are answered by the CPU, once, and nobody else's are changed."""

import pytest
import torch
from megatron.core import tensor_parallel
from megatron.core.optimizer import clip_grads
from megatron.core.utils import local_multi_tensor_l2_norm

from megatron_peft.runtime import cpu
from tests.training.waits import Waits

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU nothing is redirected")


@pytest.fixture(scope="module", autouse=True)
def installed():
    cpu.install()


def test_a_second_install_changes_nothing():
    def patched():
        return [torch.zeros, torch.Tensor.type, torch.Tensor.cuda, torch.cuda.current_device, torch.cuda.get_rng_state]

    before = patched()
    cpu.install()
    assert patched() == before


def test_factories_read_cuda_as_the_cpu_and_pass_other_devices_and_arguments_on():
    factories = [torch.empty, torch.zeros, torch.ones, torch.rand, torch.arange, torch.randn, torch.tensor]
    for device in ("cuda", "cuda:3", torch.device("cuda"), torch.device("cuda", 1)):
        made = [torch.full((2,), 3, device=device), torch.randint(2, (2,), device=device)]
        made += [factory(2, device=device) for factory in factories]
        assert {tensor.device.type for tensor in made} == {"cpu"}
    assert torch.zeros(2, 3, device="meta").device.type == "meta"
    made = torch.ones((2,), dtype=torch.float64, requires_grad=True)
    assert made.dtype == torch.float64 and made.requires_grad


def test_the_norm_is_replaced_where_megatron_core_would_read_each_gradients_also_on_a_gpu(monkeypatch):
    kernel, gradients = object(), [torch.randn(3, 4), torch.randn(5)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found = []
    for there in (kernel, local_multi_tensor_l2_norm):
        monkeypatch.setattr(clip_grads, "l2_norm_impl", there)
        cpu.redirect_norm()
        found.append(clip_grads.l2_norm_impl)
    with Waits() as waits:
        norm, _ = found[1](0, None, [gradients], False)
    assert found[0] is kernel and not waits.found
    assert torch.equal(norm, local_multi_tensor_l2_norm(0, None, [gradients], False)[0])


def test_cuda_calls_do_nothing():
    x = torch.ones(2)
    assert x.cuda() is x
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
    assert torch.zeros(1, device=torch.cuda.current_device()).device.type == "cpu"


def test_only_megatron_core_sees_a_cuda_tensor_type():
    x = torch.ones(2)
    assert x.type() == "torch.FloatTensor"
    assert x.type(torch.float64).dtype == torch.float64
    inside = {"__name__": "megatron.core.optimizer.somewhere", "x": x}
    assert eval("x.type()", inside) == "torch.cuda.FloatTensor"
    assert eval("x.type('torch.DoubleTensor')", inside).dtype == torch.float64


def test_states_of_the_cuda_generator_are_the_cpus():
    torch.cuda.manual_seed(3)
    state, first = torch.cuda.get_rng_state(), torch.rand(2)
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(2), first)


def test_the_trackers_generator_is_separate_and_resumes():
    torch.manual_seed(0)
    tracker = tensor_parallel.get_cuda_rng_tracker()
    tracker.reset()
    tracker.add("model-parallel-rng", 7)
    before, draws = torch.get_rng_state(), []
    for _ in range(2):
        with tracker.fork():
            draws.append(torch.rand(3))
    assert not torch.equal(*draws)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(7)
    assert torch.equal(torch.rand(3), draws[0])


def test_recomputed_dropout_drops_the_same():
    tensor_parallel.model_parallel_cuda_manual_seed(5, tp_rank=0, ep_rank=0, etp_rank=0)
    x = torch.ones(1000, requires_grad=True)

    def dropped(x):
        with tensor_parallel.get_cuda_rng_tracker().fork():
            return torch.nn.functional.dropout(torch.nn.functional.dropout(x, 0.5), 0.5)

    y = tensor_parallel.checkpoint(dropped, False, x)
    y.sum().backward()
    assert torch.equal(x.grad, y)
