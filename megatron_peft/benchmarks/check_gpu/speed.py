"""Time and memory: one layer at the sizes of a rank, blocks of rotations, a whole model. Targets are for what the
allocator says and for numbers of kernels; times are for the pages that hold estimates now."""

import gc
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from megatron_peft.adapters.rotation import rotate
from megatron_peft.adapters.step import AdaptersStep
from megatron_peft.adapters.urnn import DENSE_UP_TO, StructuredUrnn, rotate_by_fourier
from megatron_peft.benchmarks.check_gpu.measure import attempt, busy_share, kernels_of, milliseconds
from megatron_peft.benchmarks.check_gpu.subjects import (
    FULL_RECOMPUTE,
    SEED,
    CheckPlace,
    microbatches,
    random_microbatch,
    random_state,
    state_of,
)
from megatron_peft.benchmarks.layers import Alone
from megatron_peft.benchmarks.measure import MIB, Figure
from megatron_peft.config import PeftConfig
from megatron_peft.models.shape import ModelShape
from megatron_peft.parallel.layout import LinearLayout
from megatron_peft.rehearsal.asked import Lengths, RankToRehearse
from megatron_peft.rehearsal.rehearsal import rehearse
from megatron_peft.training.metrics import memory_bytes
from megatron_peft.training.state import TrainingState
from megatron_peft.training.step import finish_with, run_schedule, train_step

ALLOCATED = 64 * MIB
PLAN_MAY_MISS = 0.05  # workspaces of products and attention are not in it


def check_memory(place: CheckPlace) -> Iterator[Figure]:
    """Metrics before and after a known allocation; planned peaks beside measured ones; what stays reserved with
    --empty-unused-memory-level 2."""
    yield from attempt("metrics of memory", _known_allocation, place)
    for method in place.sizes.methods:
        yield from attempt(f"{method}: planned peak", _peak_beside_the_plan, place, method)
    if torch.cuda.is_available():
        yield from attempt("reserved after a step with level 2 / level 0", _reserved_by_level, place)


def _known_allocation(name: str, place: CheckPlace) -> list[Figure]:
    before, _ = memory_bytes()
    block = torch.ones(ALLOCATED, dtype=torch.uint8, device=place.device)
    current, peak = memory_bytes()
    grown = (current - before) / block.nbytes
    return [
        Figure(f"{name}: growth over an allocation, less 1", abs(grown - 1), 0.1, note="64 MiB"),
        Figure(f"{name}: current above the peak", float(current > peak), 0.0, note=f"{peak / MIB:,.0f} MiB"),
    ]


def _peak_beside_the_plan(name: str, place: CheckPlace, method: str) -> Figure:
    """How far the allocator's peak over a second step is from the rehearsed one; without a GPU, the rehearsed one."""
    _release()
    before, tokens = torch.cuda.memory_allocated(), place.sizes.model_tokens
    one_row = {"micro_batch_size": 1, "global_batch_size": 1}
    local = {"bf16": True, "transformer_impl": "local"}  # as a rehearsal builds it
    state = random_state(place.sizes.model, method, model=local, training=one_row)
    batch = [random_microbatch(state.shape, tokens)]
    [record] = rehearse([RankToRehearse(state.config, state.shape, 0, 1, (Lengths(1, tokens),), ())])
    planned = record.peak("step")
    train_step(state, batch)
    if not torch.cuda.is_available():
        return Figure(name, planned / MIB, unit="MiB")
    torch.cuda.reset_peak_memory_stats()
    train_step(state, batch)
    measured = torch.cuda.max_memory_allocated() - before
    note = f"{measured / 2**30:.2f} GiB measured, {planned / 2**30:.2f} GiB planned"
    return Figure(f"{method}: measured / planned peak, less 1", abs(measured / planned - 1), PLAN_MAY_MISS, note=note)


def _reserved_by_level(name: str, place: CheckPlace) -> Figure:
    reserved = {level: _reserved(place, level) for level in (0, 2)}
    note = f"{reserved[2] / MIB:,.0f} and {reserved[0] / MIB:,.0f} MiB"
    return Figure(name, reserved[2] / reserved[0], 1.0, note=note)


def _reserved(place: CheckPlace, level: int) -> int:
    _release()
    state = state_of(place, "lora", training={"empty_unused_memory_level": level})
    train_step(state, microbatches())
    return torch.cuda.memory_reserved()


# Operations that an adapter adds to a frozen linear layer in a microbatch, forward and backward, as
# tests/adapters/test_operation_counts.py counts them.
ADDED_OPERATIONS = {"lora": 3 + 7, "lora-ga": 3 + 7, "boft": 2 + 4, "urnn": 2 + 4, "hybrid": 5 + 13}
LINEAR_LAYERS = 4  # of a transformer layer
# A kernel is no operation: a product that is split along its inner side sums the parts in a second kernel, and where an
# adapter reads the input of linear_fc2, SwiGLU is computed again. So twice the operations, which is an estimate.
KERNELS_AN_OPERATION = 2


def check_layer_time(place: CheckPlace) -> Iterator[Figure]:
    """Forward and backward of a frozen layer and of each method's, by number of tokens of the microbatch."""
    for tokens in place.sizes.shard_tokens:
        counted: dict[str | None, int] = {}
        for method in (None, *place.sizes.methods):
            name = f"{method or 'frozen'}, {tokens:,} tokens"
            yield from attempt(name, _time_of_layer, place, method, tokens, counted)


def _time_of_layer(
    name: str, place: CheckPlace, method: str | None, tokens: int, counted: dict[str | None, int]
) -> Iterator[Figure]:
    """`counted`: kernels by method, of those before; None is the frozen layer."""
    _release()
    step = microbatch_step(random_state(place.sizes.shard, method), tokens)
    yield Figure(f"{name}: forward and backward", milliseconds(step, place.sizes.turns, place.device), unit="ms")
    kernels = kernels_of(step, place.device)
    counted[method] = len(kernels)
    yield Figure(f"{name}: kernels", len(kernels))
    yield Figure(f"{name}: share of the time in which the device is busy", busy_share(kernels))
    if method is not None and None in counted:
        yield added_kernels(name, method, len(kernels) - counted[None], place.device)


def added_kernels(name: str, method: str, number: int, device: torch.device) -> Figure:
    """Kernels beyond those of the frozen layer.

    Without a target on a CPU, where views of tensors count too, and for methods of other packages.
    """
    name, operations = f"{name}: kernels beyond the frozen layer's", ADDED_OPERATIONS.get(method)
    if operations is None or device.type != "cuda":
        return Figure(name, number)
    note = f"{operations} operations in each of {LINEAR_LAYERS} linear layers"
    return Figure(name, number, KERNELS_AN_OPERATION * LINEAR_LAYERS * operations, note=note)


def microbatch_step(state: TrainingState, tokens: int) -> Callable[[], Any]:
    """Forward and backward of one microbatch of a run, with the blocks of rotations built once before."""
    step = AdaptersStep(state.model_chunks)
    step.begin()
    finish_with(state.model_chunks, lambda *_, **__: None)
    return partial(run_schedule, state.model_chunks, [random_microbatch(state.shape, tokens)], forward_only=False)


def check_rotations_time(place: CheckPlace) -> Iterator[Figure]:
    """Building and differentiating the blocks of one layer's rotations; a uRNN's rotation by blocks and by FFT."""
    for method in place.sizes.methods:
        yield from attempt(f"{method}: blocks of a layer and their gradients", _time_of_rotations, place, method)
    for size in place.sizes.groups:
        yield from attempt(f"uRNN, groups of {size}: Fourier / blocks", _crossover, place, size)


def _time_of_rotations(name: str, place: CheckPlace, method: str) -> list[Figure]:
    _release()
    state = random_state(place.sizes.shard, method)
    step = AdaptersStep(state.model_chunks)
    if not step.layers:
        return []

    def built_and_finished() -> None:
        step.begin()
        step.finish(state.model_chunks)

    taken = milliseconds(built_and_finished, place.sizes.turns, place.device)
    note = f"{len(kernels_of(built_and_finished, place.device))} kernels, once a step"
    return [Figure(name, taken, unit="ms", note=note)]


NUM_FEATURES, NUM_TOKENS = 4096, 1024


def _crossover(name: str, place: CheckPlace, size: int) -> Figure:
    alone: Any = Alone()
    features, tokens = max(NUM_FEATURES // 16 if place.device.type == "cpu" else NUM_FEATURES, size), NUM_TOKENS
    layout = LinearLayout("row", features, 64, alone)
    adapter = StructuredUrnn(layout, PeftConfig("urnn", urnn_block_size=size), "layer.adapter", SEED, torch.float32)
    x = torch.randn(tokens, 1, features, device=place.device, requires_grad=True)
    upstream = torch.randn(tokens, 1, features, device=place.device)
    fixed = adapter.start, adapter.permutation
    ways = {
        "blocks": lambda: rotate(x, adapter.changes()).backward(upstream),
        "Fourier": lambda: rotate_by_fourier(x, adapter.theta, *fixed, slice(None), False).backward(upstream),
    }
    taken = {name: milliseconds(way, place.sizes.turns, place.device) for name, way in ways.items()}
    note = "; ".join(f"{name} {value:.3f} ms" for name, value in taken.items())
    note += f"; blocks are used up to {DENSE_UP_TO}"
    return Figure(name, taken["Fourier"] / taken["blocks"], note=note)


def check_model_speed(place: CheckPlace) -> Iterator[Figure]:
    """A step of LoRA in bf16, activations kept or recomputed; `model_flops` says what is counted."""
    for way, transformer in (("kept", {}), ("recomputed", FULL_RECOMPUTE)):
        yield from attempt(f"LoRA, {way} activations", _speed, place, transformer)


def _speed(name: str, place: CheckPlace, transformer: dict[str, Any]) -> Figure:
    _release()
    shape, tokens = place.sizes.model, place.sizes.model_tokens
    step_of = {"micro_batch_size": 1, "global_batch_size": 1}
    state = random_state(shape, "lora", transformer=transformer, training=step_of)
    batch = [random_microbatch(shape, tokens)]
    taken = milliseconds(lambda: train_step(state, batch), place.sizes.turns, place.device)
    flops = model_flops(shape, tokens)
    note = f"{taken:.1f} ms a step, {1000 * tokens / taken:,.0f} tokens/s, peak {memory_bytes()[1] / 2**30:.1f} GiB"
    return Figure(name, flops / taken / 1e9, unit="TFLOP/s", note=note)


def model_flops(shape: ModelShape, tokens: int) -> float:
    """Of forward and backward of one sequence with frozen weights; recomputed activations do not count.

    Each weight of a product counts 2 in forward and 2 for the gradient of its input; scores and their products with
    the values count 4 and 8 a pair of positions and feature, and a causal mask leaves half of the pairs.
    """
    heads = shape.num_attention_heads * shape.kv_channels
    attention = shape.hidden_size * (2 * heads + 2 * shape.num_query_groups * shape.kv_channels)
    mlp = (3 if shape.gated_linear_unit else 2) * shape.hidden_size * shape.ffn_hidden_size
    weights = shape.num_layers * (attention + mlp) + shape.hidden_size * shape.vocab_size
    return 4.0 * weights * tokens + shape.num_layers * 12.0 * heads * tokens**2 / 2


def _release() -> None:
    """Free what earlier subjects held, so that a large one fits."""
    gc.collect()
    torch.cuda.empty_cache()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
