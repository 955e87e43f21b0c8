"""Gradients of bfloat16 factors reach megatron-core's float32 buffer as they are summed: nothing rounds them before."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from megatron_peft.adapters import hybrid, low_rank
from megatron_peft.adapters.linear import AdaptedColumnParallelLinear
from megatron_peft.config import PeftConfig
from tests.adapters.layer_runs import layer_config
from tests.one_rank import one_rank

SIZE, TOKENS = 64, 128
FORMS: dict[str, Any] = {
    "lora": (low_rank, {"method": "lora"}),
    "subtracted start": (low_rank, {"method": "lora-ga", "lora_ga_init": "paper"}),
    "hybrid": (hybrid, {"method": "hybrid", "lora_ga_init": "paper", "boft_block_size": 4, "boft_factors": 2}),
}


@pytest.fixture(scope="module", autouse=True)
def world() -> Iterator[None]:
    with one_rank():
        yield


def gradients_of(form: str, dtype: torch.dtype, microbatches: int = 1) -> list[torch.Tensor]:
    """Of A and B, in buffers such as megatron-core's, filled as its hook does."""
    draw = torch.Generator().manual_seed(0)
    config = layer_config(1, False)
    config.params_dtype, config.linear_biases = dtype, set()
    layer: Any = AdaptedColumnParallelLinear(
        SIZE, SIZE, config=config, init_method=lambda weight: None, bias=False, tp_comm_buffer_name="fc1"
    )
    layer.requires_grad_(False).is_frozen = True
    method, settings = FORMS[form]
    layer.adapter = method.build(layer.layout, PeftConfig(lora_rank=4, **settings), "layer", 0, dtype)
    factors = getattr(layer.adapter, "low_rank", layer.adapter)
    for one in (layer.weight, factors.A, factors.B):
        one.data.copy_((0.1 * torch.randn(one.shape, generator=draw)).bfloat16())
    for parameter in layer.adapter.parameters():
        parameter.main_grad, parameter.grad_added_to_main_grad = torch.zeros_like(parameter, dtype=torch.float32), False
    x, grad = torch.randn(2, TOKENS, 1, SIZE, generator=draw).bfloat16().to(dtype)
    for _ in range(microbatches):
        layer(x.detach().requires_grad_())[0].backward(grad)
        for parameter in layer.adapter.parameters():
            if not parameter.grad_added_to_main_grad:
                parameter.main_grad.add_(parameter.grad)
            parameter.grad = None
    return [factors.A.main_grad, factors.B.main_grad]


@pytest.mark.parametrize("form", FORMS)
def test_gradients_of_bfloat16_factors_are_not_rounded(form):
    once, twice = gradients_of(form, torch.bfloat16), gradients_of(form, torch.bfloat16, microbatches=2)
    for found, doubled, exact in zip(once, twice, gradients_of(form, torch.float32), strict=True):
        assert (found != found.bfloat16()).float().mean() > 0.9
        assert torch.equal(doubled, 2 * found)
        assert (found - exact).norm() < 0.02 * exact.norm()
