"""Adapted layers in bf16 and float32, on whatever device there is, beside the same layers in float64 on the CPU.

A tolerance follows from the type: a result is rounded once and its terms a few times, so the norm of the difference
stays within a few units of the last place. A wrong kernel, TF32 in place of float32 (10 bits of 23) or a change that
is not applied differs by far more: the adapters are moved from their start until they change a tenth of the output.
Gradients of bf16 factors are summed over two microbatches in a float32 buffer; nothing rounds them before.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron_peft.adapters.attach import TargetLayer, linear_layers
from megatron_peft.adapters.step import adapters_step
from megatron_peft.parallel.collectives import gradient_of
from megatron_peft.parallel.layout import generator_for
from megatron_peft.runtime.precision import full_precision
from tests.benchmarks.gpu_subjects import SEED, chosen_sizes, device, random_chunks, random_state, relative, run_config
from tests.one_rank import one_rank

SIZES = chosen_sizes()
ULPS = {torch.bfloat16: 2, torch.float32: 32}  # units of the last place
NAMES = {torch.bfloat16: "bf16", torch.float32: "float32"}
MOVED = 0.1
MOST_ROUNDED = 0.1  # share of float32 numbers that bf16 would hold by chance: 2^-16
NUM_MICROBATCHES = 2
# By name: a method, and its numbers. LoRA-GA's start by the paper subtracts a frozen copy of the factors.
FORMS: dict[str, tuple[str, dict[str, Any]]] = {name: (name, {}) for name in SIZES.methods}
FORMS |= {f"{name} by the paper": (name, {"lora_ga_init": "paper"}) for name in ("lora-ga", "hybrid")}


@pytest.fixture(scope="module", autouse=True)
def world() -> Iterator[None]:
    with one_rank():
        yield


@pytest.mark.gpu("layers")
@pytest.mark.parametrize("dtype", ULPS, ids=NAMES.get)
@pytest.mark.parametrize("form", FORMS)
def test_a_methods_linear_layers_are_those_of_float64(figure, form, dtype):
    """The worst of four. As in a step, blocks of rotations are built for all, and gradients go to buffers."""
    method, peft = FORMS[form]
    state = random_state(SIZES.layer, method, peft=peft, model={"bf16": dtype == torch.bfloat16})
    move_adapters(state.model_chunks[0])
    tested = [*linear_layers(state.model_chunks[0])]
    reference = [*linear_layers(in_float64(method, peft, state.model_chunks[0].module))]
    state.model_chunks[0].zero_grad_buffer()
    with full_precision, adapters_step(state.model_chunks) as step:
        found = [run(one, dtype, device()) for one in tested]
        step.finish(state.model_chunks)
    expected = [run(one, torch.float64, torch.device("cpu")) for one in reference]
    gradients = [[gradients_of(one) for one in layers] for layers in (tested, reference)]
    tolerance, note = ULPS[dtype] * torch.finfo(dtype).eps, f"{ULPS[dtype]} units of the last place"
    name = f"{form}, {NAMES[dtype]}"
    figure(f"{name}: output and input gradient", worst(found, expected), tolerance, note=note)
    figure(f"{name}: gradients of parameters", worst(*gradients), tolerance, note=note)
    if dtype == torch.bfloat16:  # one that was rounded on its way to the buffer has all of its numbers in bf16
        shares = [float((one == one.bfloat16()).float().mean()) for layer in gradients[0] for one in layer]
        figure(f"{name}: entries of gradients that bf16 holds", max(shares), MOST_ROUNDED)


@torch.no_grad()
def move_adapters(chunk: nn.Module) -> None:
    for name, parameter in chunk.named_parameters():
        if parameter.requires_grad:
            drawn = torch.randn(parameter.shape, generator=generator_for(SEED, f"moved {name}"), device="cpu")
            parameter.add_(MOVED * drawn.to(parameter))


def in_float64(method: str, peft: dict[str, Any], tested: nn.Module) -> nn.Module:
    """The same model on the CPU."""
    (made,) = random_chunks(SIZES.layer, run_config("random", method, peft=peft), method)
    made.to("cpu", torch.float64)
    given = tested.state_dict()
    with torch.no_grad():
        for name, tensor in made.state_dict().items():
            if isinstance(tensor, Tensor):
                tensor.copy_(given[name])
    return made


def run(layer: TargetLayer, dtype: torch.dtype, place: torch.device) -> list[Tensor]:
    """y and dx of one linear layer and each microbatch; inputs are the same bf16 numbers in every type."""
    module, found = layer.module, []
    for number in range(NUM_MICROBATCHES):
        x = draw(f"x {number} {layer.name}", module.weight.shape[1]).to(place, dtype).requires_grad_()
        y = module(x)[0]
        y.backward(draw(f"dy {number} {layer.name}", y.shape[-1]).to(place, dtype))
        assert x.grad is not None
        found += [y, x.grad]
    return found


def draw(name: str, features: int) -> Tensor:
    size = SIZES.layer_tokens, 1, features
    return torch.randn(*size, generator=generator_for(SEED, name), device="cpu").bfloat16()


def gradients_of(layer: TargetLayer) -> list[Tensor]:
    return [gradient_of(one) for one in layer.module.parameters() if one.requires_grad]


def worst(found: list[list[Tensor]], expected: list[list[Tensor]]) -> float:
    pairs = [pair for ours, theirs in zip(found, expected, strict=True) for pair in zip(ours, theirs, strict=True)]
    return max(relative(*pair) for pair in pairs)
