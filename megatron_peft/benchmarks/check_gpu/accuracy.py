"""Layers on the device beside the same layers in float64 on the CPU.

A tolerance follows from the type: a result is rounded once and its terms a few times, so the norm of the difference
stays within a few units of the last place. A wrong kernel, TF32 in place of float32 (10 bits of 23) or a change that
is not applied differs by far more: the adapters are moved from their start until they change a tenth of the output.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_peft.adapters.attach import TargetLayer, linear_layers
from megatron_peft.adapters.step import adapters_step
from megatron_peft.benchmarks.check_gpu.measure import attempt
from megatron_peft.benchmarks.check_gpu.subjects import (
    SEED,
    CheckPlace,
    random_chunks,
    random_state,
    relative,
    run_config,
)
from megatron_peft.benchmarks.measure import Figure
from megatron_peft.models.layers import AlibiAttention, AlibiBias
from megatron_peft.parallel.collectives import gradient_of
from megatron_peft.parallel.layout import generator_for
from megatron_peft.runtime.precision import full_precision
from megatron_peft.training.validation import largest_orthogonality_error

ULPS = {torch.bfloat16: 2, torch.float32: 32}  # units of the last place
NAMES = {torch.bfloat16: "bf16", torch.float32: "float32"}
LARGEST_ORTHOGONALITY_ERROR = 1e-5
MOST_ROUNDED = 0.1  # share of float32 numbers that bf16 would hold by chance: 2^-16
MOVED = 0.1


def tolerance(dtype: torch.dtype) -> float:
    """The largest relative difference of a result of this type."""
    return ULPS[dtype] * torch.finfo(dtype).eps


def check_layers(place: CheckPlace) -> Iterator[Figure]:
    """Output, input gradient and gradients of every trained tensor, the worst of a layer's four linear ones."""
    for method in place.sizes.methods:
        for dtype in ULPS:
            yield from attempt(f"{method}, {NAMES[dtype]}", _compare, place, method, dtype)


def _compare(name: str, place: CheckPlace, method: str, dtype: torch.dtype) -> list[Figure]:
    # As in a step: blocks of rotations are built for all layers, gradients go to megatron-core's buffers.
    state = random_state(place.sizes.layer, method, model={"bf16": dtype == torch.bfloat16})
    _move(state.model_chunks[0])
    tested = list(linear_layers(state.model_chunks[0]))
    reference = list(linear_layers(_in_float64(place, method, state.model_chunks[0].module)))
    state.model_chunks[0].zero_grad_buffer()
    with full_precision, adapters_step(state.model_chunks) as step:
        found = [_run(one, place, dtype, place.device) for one in tested]
        step.finish(state.model_chunks)
    gradients = [_gradients(one) for one in tested]
    expected = [_run(one, place, torch.float64, torch.device("cpu")) for one in reference]
    figures = [
        _worst(f"{name}: output and input gradient", dtype, found, expected),
        _worst(f"{name}: gradients of parameters", dtype, gradients, [_gradients(one) for one in reference]),
    ]
    if dtype == torch.bfloat16:
        figures.append(_rounded(f"{name}: entries of gradients that bf16 holds", gradients))
    return figures


@torch.no_grad()
def _move(chunk: nn.Module) -> None:
    for name, parameter in chunk.named_parameters():
        if parameter.requires_grad:
            drawn = torch.randn(parameter.shape, generator=generator_for(SEED, f"moved {name}"), device="cpu")
            parameter.add_(MOVED * drawn.to(parameter))


def _in_float64(place: CheckPlace, method: str, tested: nn.Module) -> nn.Module:
    (made,) = random_chunks(place.sizes.layer, run_config("random", method), method)
    made.to("cpu", torch.float64)
    given = tested.state_dict()
    with torch.no_grad():
        for name, tensor in made.state_dict().items():
            if isinstance(tensor, Tensor):
                tensor.copy_(given[name])
    return made


def _run(layer: TargetLayer, place: CheckPlace, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """(y, dx) of one linear layer; inputs are the same bf16 numbers in every type."""
    module = layer.module
    size = place.sizes.layer_tokens, 1
    x = _draw(f"x {layer.name}", *size, module.weight.shape[1]).to(device, dtype).requires_grad_()
    y = module(x)[0]
    y.backward(_draw(f"dy {layer.name}", *size, y.shape[-1]).to(device, dtype))
    assert x.grad is not None
    return [y, x.grad]


def _draw(name: str, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator_for(SEED, name), device="cpu").bfloat16()


def _gradients(layer: TargetLayer) -> list[Tensor]:
    return [gradient_of(one) for one in layer.module.parameters() if one.requires_grad]


def _worst(name: str, dtype: torch.dtype, found: list[list[Tensor]], expected: list[list[Tensor]]) -> Figure:
    pairs = [pair for ours, theirs in zip(found, expected, strict=True) for pair in zip(ours, theirs, strict=True)]
    worst = max(relative(*pair) for pair in pairs)
    return Figure(name, worst, tolerance(dtype), note=f"{len(pairs)} tensors, {ULPS[dtype]} units of the last place")


def _rounded(name: str, gradients: list[list[Tensor]]) -> Figure:
    """A gradient that was rounded to bf16 on its way to the float32 buffer has all of its numbers there."""
    shares = [float((one == one.bfloat16()).float().mean()) for layer in gradients for one in layer]
    return Figure(name, max(shares), MOST_ROUNDED)


def check_precision(place: CheckPlace) -> Iterator[Figure]:
    """|R^T R - I| of rotations moved from their start, where a program allows TF32."""
    for method in place.sizes.methods:
        yield from attempt(f"{method}: orthogonality error while TF32 is allowed", _orthogonality_error, place, method)


def _orthogonality_error(name: str, place: CheckPlace, method: str) -> list[Figure]:
    """No figure for a method without rotations."""
    with _tf32_allowed():
        state = random_state(place.sizes.layer, method)
        _move(state.model_chunks[0])
        error = largest_orthogonality_error(state)
    return [] if error is None else [Figure(name, error, LARGEST_ORTHOGONALITY_ERROR)]


@contextmanager
def _tf32_allowed() -> Iterator[None]:
    """What TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1 does at the start of a program."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


LENGTHS = (37, 64)  # one is no multiple of 16


def check_alibi(place: CheckPlace) -> Iterator[Figure]:
    """Output and gradient of the queries, at two lengths."""
    for dtype in ULPS:
        for length in LENGTHS:
            yield from attempt(f"{length} positions, {NAMES[dtype]}", _alibi, place, length, dtype)


def _alibi(name: str, place: CheckPlace, length: int, dtype: torch.dtype) -> Figure:
    found = _attend(length, dtype, place.device)
    expected = _attend(length, torch.float64, torch.device("cpu"))
    worst = max(relative(*pair) for pair in zip(found, expected, strict=True))
    return Figure(name, worst, 2 * tolerance(dtype))


def _attend(length: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    heads, channels = 4, 32
    config = TransformerConfig(
        num_layers=1, hidden_size=heads * channels, num_attention_heads=heads, attention_dropout=0.0
    )
    attention: Any = AlibiAttention(config, 1, AttnMaskType.causal, "self", bias=AlibiBias(heads, 0, 1))
    query, key, value = (_draw(name, length, 2, heads, channels).to(device, dtype) for name in "qkv")
    query.requires_grad_()
    out = attention(query, key, value, None)
    out.backward(_draw("out", *out.shape).to(device, dtype))
    assert query.grad is not None
    return [out, query.grad]
