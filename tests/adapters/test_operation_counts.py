"""How many kernels an adapter adds to a frozen layer, counted on meta tensors along the path that CUDA takes.

On a GPU a step of few tokens is bound by launches. Counted are operations of aten that compute: neither views nor
allocations.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_peft.adapters import boft, hybrid, low_rank, urnn
from megatron_peft.adapters.linear import AdaptedColumnParallelLinear
from megatron_peft.adapters.step_rotations import StepRotations, step_rotations
from megatron_peft.config import PeftConfig
from tests.adapters.layer_runs import layer_config
from tests.one_rank import one_rank

HIDDEN, TOKENS, LAYERS = 64, 32, 5
ADAPTERS: dict[str, Any] = {"lora": low_rank, "boft": boft, "urnn": urnn, "hybrid": hybrid}

# Beyond the frozen layer, a microbatch: forward, backward, autograd's additions to the parameters' gradients.
A_MICROBATCH = {"lora": (3, 7, 0), "boft": (2, 4, 0), "urnn": (2, 4, 0), "hybrid": (5, 13, 0)}
# All layers of a stage together, however many there are.
A_STEP = {"boft": 40, "urnn": 108, "hybrid": 47}

FREE = {"aten::empty", "aten::empty_like", "aten::new_empty", "aten::_unsafe_view", "aten::empty_strided"}


class Kernels(TorchDispatchMode):
    """Counts operations that compute."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returned = [one.alias_info for one in func._schema.returns]
        is_view = any(one is not None and not one.is_write for one in returned)
        if not is_view and func._schema.name not in FREE:
            self.names[func._schema.name] += 1
        return func(*args, **(kwargs or {}))

    @property
    def count(self) -> int:
        return self.names.total()


@pytest.fixture(scope="module", autouse=True)
def world() -> Iterator[None]:
    with one_rank():
        yield


def layers(method: str | None, count: int = 1) -> nn.ModuleList:
    """Column-parallel layers in bfloat16 on meta tensors, each parameter with megatron-core's buffer."""
    config = layer_config(HIDDEN, 4, 1, False)
    config.params_dtype, config.linear_biases = torch.bfloat16, set()
    made = nn.ModuleList()
    for number in range(count):
        layer: Any = AdaptedColumnParallelLinear(
            HIDDEN, HIDDEN, config=config, init_method=lambda weight: None, bias=False, tp_comm_buffer_name="fc1"
        )
        layer.requires_grad_(False).is_frozen = True
        if method is not None:
            peft = PeftConfig(method=method, lora_rank=4, boft_block_size=4, boft_factors=3, urnn_block_size=16)
            layer.adapter = ADAPTERS[method].build(layer.layout, peft, f"layer {number}", 0, torch.bfloat16)
        made.append(layer)
    made.to("meta")
    for parameter in made.parameters():
        if parameter.requires_grad:
            parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float32)  # pyright: ignore[reportAttributeAccessIssue]
    return made


def a_microbatch(method: str | None) -> tuple[Counter[str], Counter[str], int]:
    """Kernels of (forward, backward, additions to gradients)."""
    stage = layers(method)
    x = torch.zeros(TOKENS, 1, HIDDEN, dtype=torch.bfloat16, device="meta", requires_grad=True)
    with step_rotations([stage]):
        with Kernels() as forward:
            y, _ = stage[0](x)
        with Kernels() as backward:
            y.backward(torch.zeros_like(y))
    added = [one for one in stage.parameters() if one.grad is not None and not one.grad_added_to_main_grad]  # pyright: ignore[reportAttributeAccessIssue]
    backward.names["aten::zeros_like"] -= 1  # the gradient that this test gives
    return forward.names, +backward.names, len(added)


@pytest.mark.parametrize("method", A_MICROBATCH)
def test_an_adapter_adds_few_kernels_to_a_microbatch(method):
    frozen, adapted = a_microbatch(None), a_microbatch(method)
    found = tuple((ours - theirs) for ours, theirs in zip(adapted[:2], frozen[:2], strict=True))
    assert (*(one.total() for one in found), adapted[2]) == A_MICROBATCH[method], found


@pytest.mark.parametrize("method", A_STEP)
def test_rotations_of_all_layers_are_one_computation(method):
    def a_step(count: int) -> Counter[str]:
        rotations = StepRotations([layers(method, count)])
        rotations.build()  # U(theta_0) is made once a run
        with Kernels() as kernels:
            rotations.build()
            rotations.finish([])
        return kernels.names

    few, many = a_step(2), a_step(LAYERS)
    assert many == few
    assert many.total() == A_STEP[method], many
