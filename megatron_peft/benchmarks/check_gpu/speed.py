"""Time and memory: one layer at the sizes of a rank, blocks of rotations, a whole model. Nothing here has a target but
what the allocator says; the numbers are for the pages that hold estimates now."""

import gc
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from megatron_peft.adapters.rotation import rotate
from megatron_peft.adapters.step_rotations import StepRotations
from megatron_peft.adapters.urnn import DENSE_UP_TO, StructuredUrnn, rotate_by_fourier
from megatron_peft.benchmarks.check_gpu.measure import busy_share, kernels_of, milliseconds
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
from megatron_peft.planning.rehearsal import Lengths, RankToRehearse, rehearse
from megatron_peft.training.metrics import memory_bytes
from megatron_peft.training.state import TrainingState
from megatron_peft.training.step import finish_with, run_schedule, train_step

ALLOCATED = 64 * MIB
PLAN_MAY_MISS = 0.05  # workspaces of products and attention are not in it


def check_memory(place: CheckPlace) -> list[Figure]:
    """Metrics before and after a known allocation; planned peaks beside measured ones; what stays reserved with
    --empty-unused-memory-level 2."""
    before, _ = memory_bytes()
    block = torch.ones(ALLOCATED, dtype=torch.uint8, device=place.device)
    current, peak = memory_bytes()
    grown = (current - before) / block.nbytes
    figures = [
        Figure("growth of memory_bytes over an allocation, less 1", abs(grown - 1), 0.1, note="64 MiB"),
        Figure("current memory above its peak", float(current > peak), 0.0, note=f"{peak / MIB:,.0f} MiB"),
    ]
    del block
    figures += [_peak_beside_the_plan(place, method) for method in place.sizes.methods]
    if not torch.cuda.is_available():
        return figures
    reserved = {level: _reserved(place, level) for level in (0, 2)}
    note = f"{reserved[2] / MIB:,.0f} and {reserved[0] / MIB:,.0f} MiB"
    return [*figures, Figure("reserved after a step with level 2 / level 0", reserved[2] / reserved[0], 1.0, note=note)]


def _peak_beside_the_plan(place: CheckPlace, method: str) -> Figure:
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
        return Figure(f"{method}: planned peak", planned / MIB, unit="MiB")
    torch.cuda.reset_peak_memory_stats()
    train_step(state, batch)
    measured = torch.cuda.max_memory_allocated() - before
    note = f"{measured / 2**30:.2f} GiB measured, {planned / 2**30:.2f} GiB planned"
    return Figure(f"{method}: measured / planned peak, less 1", abs(measured / planned - 1), PLAN_MAY_MISS, note=note)


def _reserved(place: CheckPlace, level: int) -> int:
    _release()
    state = state_of(place, "lora", training={"empty_unused_memory_level": level})
    train_step(state, microbatches())
    return torch.cuda.memory_reserved()


def check_layer_time(place: CheckPlace) -> list[Figure]:
    """Forward and backward of a frozen layer and of each method's, by number of tokens of the microbatch."""
    sizes = place.sizes
    return [
        figure
        for tokens in sizes.shard_tokens
        for method in (None, *sizes.methods)
        for figure in _time_of_layer(place, method, tokens)
    ]


def _time_of_layer(place: CheckPlace, method: str | None, tokens: int) -> list[Figure]:
    _release()
    step = microbatch_step(random_state(place.sizes.shard, method), tokens)
    taken = milliseconds(step, place.sizes.turns, place.device)
    kernels = kernels_of(step, place.device)
    name = f"{method or 'frozen'}, {tokens:,} tokens"
    return [
        Figure(f"{name}: forward and backward", taken, unit="ms"),
        Figure(f"{name}: kernels", len(kernels)),
        Figure(f"{name}: share of the time in which the device is busy", busy_share(kernels)),
    ]


def microbatch_step(state: TrainingState, tokens: int) -> Callable[[], Any]:
    """Forward and backward of one microbatch of a run, with the blocks of rotations built once before."""
    rotations = StepRotations(state.model_chunks)
    rotations.build()
    finish_with(state.model_chunks, lambda *_, **__: None)
    return partial(run_schedule, state.model_chunks, [random_microbatch(state.shape, tokens)], forward_only=False)


def check_rotations_time(place: CheckPlace) -> list[Figure]:
    """Building and differentiating the blocks of one layer's rotations; a uRNN's rotation by blocks and by FFT."""
    built = [figure for method in place.sizes.methods for figure in _time_of_rotations(place, method)]
    return [*built, *(_crossover(place, size) for size in place.sizes.groups)]


def _time_of_rotations(place: CheckPlace, method: str) -> list[Figure]:
    _release()
    state = random_state(place.sizes.shard, method)
    rotations = StepRotations(state.model_chunks)
    if not rotations.stacks:
        return []

    def step() -> None:
        rotations.build()
        rotations.finish(state.model_chunks)

    taken = milliseconds(step, place.sizes.turns, place.device)
    note = f"{len(kernels_of(step, place.device))} kernels, once a step"
    return [Figure(f"{method}: blocks of a layer and their gradients", taken, unit="ms", note=note)]


NUM_FEATURES, NUM_TOKENS = 4096, 1024


def _crossover(place: CheckPlace, size: int) -> Figure:
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
    return Figure(f"uRNN, groups of {size}: Fourier / blocks", taken["Fourier"] / taken["blocks"], note=note)


def check_model_speed(place: CheckPlace) -> list[Figure]:
    """A step of LoRA in bf16, activations kept or recomputed; `model_flops` says what is counted."""
    return [figure for recomputed in (False, True) for figure in _speed(place, recomputed)]


def _speed(place: CheckPlace, recomputed: bool) -> list[Figure]:
    _release()
    shape, tokens = place.sizes.model, place.sizes.model_tokens
    transformer = FULL_RECOMPUTE if recomputed else {}
    step_of = {"micro_batch_size": 1, "global_batch_size": 1}
    state = random_state(shape, "lora", transformer=transformer, training=step_of)
    batch = [random_microbatch(shape, tokens)]
    taken = milliseconds(lambda: train_step(state, batch), place.sizes.turns, place.device)
    flops = model_flops(shape, tokens)
    name = f"LoRA, {'recomputed' if recomputed else 'kept'} activations"
    note = f"{taken:.1f} ms a step, {1000 * tokens / taken:,.0f} tokens/s, peak {memory_bytes()[1] / 2**30:.1f} GiB"
    return [Figure(name, flops / taken / 1e9, unit="TFLOP/s", note=note)]


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
