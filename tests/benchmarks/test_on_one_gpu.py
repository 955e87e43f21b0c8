"""What check-gpu alone asks: what is installed, memory beside the plan, times and kernels. A CPU shows that it can."""

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import distributions
from statistics import median
from typing import Any

import pytest
import torch
from torch.autograd import DeviceType
from torch.cuda import nccl
from torch.profiler import ProfilerActivity, profile
from torch.utils import collect_env

from megatron_peft.adapters.step import AdaptersStep
from megatron_peft.adapters.urnn import DENSE_UP_TO
from megatron_peft.benchmarks.layers import NUM_FEATURES, crossover_steps
from megatron_peft.benchmarks.measure import MIB, Figure
from megatron_peft.checkpoint.state import TrainingState
from megatron_peft.models.kernels import Installed
from megatron_peft.rehearsal.rehearsal import rehearse
from megatron_peft.rehearsal.requests import Lengths, RankToRehearse
from megatron_peft.training.metrics import memory_bytes
from megatron_peft.training.step import finish_with, run_schedule, train_step
from megatron_peft.training.watchers import ModelFlops
from tests.adapters.test_operation_counts import A_MICROBATCH
from tests.benchmarks.gpu_subjects import FULL_RECOMPUTE, chosen_sizes, device, random_microbatch, random_state
from tests.one_rank import one_rank

SIZES = chosen_sizes()
PLAN_MAY_MISS = 0.05  # workspaces of products and attention are not in it
ONE_ROW = {"micro_batch_size": 1, "global_batch_size": 1}
by_method = pytest.mark.parametrize("method", SIZES.methods)


@pytest.fixture(scope="module", autouse=True)
def world() -> Iterator[None]:
    with one_rank():
        yield


@pytest.fixture(autouse=True)
def released(world: None) -> None:
    release_memory()


def release_memory() -> None:
    """What earlier subjects held, so that a large one fits."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


@pytest.mark.gpu("versions")
def test_what_is_installed(figure):
    """1 for what is there, 0 for what is not; and how float32 products are rounded."""
    has_gpu, installed = torch.cuda.is_available(), {one.name: one.version for one in distributions()}
    driver = collect_env.get_nvidia_driver_version(collect_env.run)
    gpu = torch.cuda.get_device_properties(0) if has_gpu else None
    figure("GPUs", float(has_gpu), note=f"{gpu}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}")
    figure("driver", float(driver is not None), note=driver or "")
    for name in ("torch", "megatron-core", "transformer-engine", "flash-attn", "apex", "triton"):
        figure(name, float(name in installed), note=installed.get(name, ""))
    for name in ("allow_tf32", "allow_bf16_reduced_precision_reduction"):
        figure(f"float32 products: {name}", float(getattr(torch.backends.cuda.matmul, name)))
    figure("TF32 in cuDNN", float(torch.backends.cudnn.allow_tf32))
    for name, one in vars(Installed.detected()).items():
        figure(f"found: {name}", float(one not in (False, 0, (0, 0), "")), note=str(one))
    libraries = [f"torch's {'.'.join(map(str, nccl.version()))}"] if has_gpu else []
    libraries += [f"{name} {version}" for name, version in installed.items() if name.startswith("nvidia-nccl-cu")]
    figure("NCCL", float(bool(libraries)), note=", ".join(libraries))


@pytest.mark.gpu("memory")
@pytest.mark.slow
@by_method
def test_planned_peak(figure, method):
    """That of the allocator over a second step; without a GPU, the planned one alone."""
    before, tokens = torch.cuda.memory_allocated(), SIZES.model_tokens
    as_rehearsed = {"bf16": True, "transformer_impl": "local"}
    state = random_state(SIZES.model, method, model=as_rehearsed, training=ONE_ROW)
    batch = [random_microbatch(state.shape, tokens)]
    [record] = rehearse([RankToRehearse(state.config, state.shape, 0, 1, Lengths(1, tokens), False)])
    planned = record.peak("step")
    train_step(state, batch)
    if not torch.cuda.is_available():
        figure(f"{method}: planned peak", planned / MIB, unit="MiB")
        return
    torch.cuda.reset_peak_memory_stats()
    train_step(state, batch)
    measured = torch.cuda.max_memory_allocated() - before
    note = f"{measured / 2**30:.2f} GiB measured, {planned / 2**30:.2f} GiB planned"
    figure(f"{method}: measured / planned peak, less 1", abs(measured / planned - 1), PLAN_MAY_MISS, note=note)


@pytest.mark.gpu("memory")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CPU reserves nothing")
def test_memory_that_stays_reserved(figure):
    level_0, level_2 = reserved_after_a_step(0), reserved_after_a_step(2)
    note = f"{level_2 / MIB:,.0f} and {level_0 / MIB:,.0f} MiB"
    figure("reserved after a step with level 2 / level 0", level_2 / level_0, 1.0, note=note)


def reserved_after_a_step(level: int) -> int:
    """Bytes, with --empty-unused-memory-level."""
    release_memory()
    state = random_state(SIZES.shard, "lora", training={**ONE_ROW, "empty_unused_memory_level": level})
    train_step(state, [random_microbatch(state.shape, SIZES.model_tokens)])
    return torch.cuda.memory_reserved()


# Milliseconds and kernels of a step on the device, and the timed steps. docs/rehearsal.md starts from them.

NUM_WARMUPS = 2


def milliseconds(step: Callable[[], Any], turns: int) -> float:
    """The median, by CUDA events; on a CPU by the clock."""
    timed = _by_events if device().type == "cuda" else _by_clock
    for _ in range(NUM_WARMUPS):
        step()
    return median(timed(step) for _ in range(turns))


def _by_events(step: Callable[[], Any]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def _by_clock(step: Callable[[], Any]) -> float:
    start = time.perf_counter()
    step()
    return 1000 * (time.perf_counter() - start)


@dataclass(frozen=True)
class Kernel:
    """One launch: its name, and when it ran, in microseconds."""

    name: str
    start: float
    end: float


def kernels_of(step: Callable[[], Any]) -> list[Kernel]:
    """What ran on the device, in order; on a CPU torch's operators that call no other one."""
    is_cuda = device().type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_cuda else [])]) as profiled:
        step()
        torch.cuda.synchronize()
    events: Any = profiled.events()
    ran = [one for one in events if (_is_kernel(one) if is_cuda else _is_leaf(one))]
    kernels = [Kernel(one.name, one.time_range.start, one.time_range.end) for one in ran]
    return sorted((one for one in kernels if not one.name.startswith("Mem")), key=lambda one: one.start)


def _is_kernel(event: Any) -> bool:
    return event.device_type == DeviceType.CUDA and not event.is_user_annotation


def _is_leaf(event: Any) -> bool:
    return event.name.startswith("aten::") and not any(one.name.startswith("aten::") for one in event.cpu_children)


def busy_share(kernels: Sequence[Kernel]) -> float:
    """Share of the time from the first to the last kernel in which at least one was running."""
    busy, until = 0.0, 0.0
    for one in kernels:
        busy += max(one.end - max(one.start, until), 0.0)
        until = max(until, one.end)
    return busy / max(until - kernels[0].start, 1e-9) if kernels else 0.0


def microbatch_step(state: TrainingState, tokens: int) -> Callable[[], Any]:
    """Forward and backward of one microbatch of a run, with the blocks of rotations built once before."""
    AdaptersStep(state.model_chunks).begin()
    finish_with(state.model_chunks, lambda *_, **__: None)
    return partial(run_schedule, state.model_chunks, [random_microbatch(state.shape, tokens)], forward_only=False)


LINEAR_LAYERS = 4  # of a transformer layer
# A kernel is no operation: a product that is split along its inner side sums the parts in a second kernel, and where an
# adapter reads the input of linear_fc2, SwiGLU is computed again. So twice the operations, which is an estimate.
KERNELS_AN_OPERATION = 2


def added_kernels(name: str, number: int, operations: int | None) -> Figure:
    """Kernels of a layer beyond those of the frozen one.

    Without a target on a CPU, where views of tensors count too, and for methods of other packages.

    Args:
        operations: that the adapter adds to a linear layer, forward and backward.
    """
    if operations is None or device().type != "cuda":
        return Figure(name, number)
    note = f"{operations} operations in each of {LINEAR_LAYERS} linear layers"
    return Figure(name, number, KERNELS_AN_OPERATION * LINEAR_LAYERS * operations, note=note)


@pytest.fixture(scope="module")
def of_frozen_layer() -> dict[int, int]:
    """Its kernels, by number of tokens."""
    return {}


@pytest.mark.gpu("layer-time")
@pytest.mark.slow
@pytest.mark.parametrize("method", [None, *SIZES.methods])
@pytest.mark.parametrize("tokens", SIZES.shard_tokens)
def test_time_of_a_layer(figure, of_frozen_layer, method, tokens):
    """Forward and backward of a frozen layer, which comes first, and of each method's."""
    name = f"{method or 'frozen'}, {tokens:,} tokens"
    step = microbatch_step(random_state(SIZES.shard, method), tokens)
    figure(f"{name}: forward and backward", milliseconds(step, SIZES.turns), unit="ms")
    kernels = kernels_of(step)
    figure(f"{name}: kernels", len(kernels))
    figure(f"{name}: share of the time in which the device is busy", busy_share(kernels))
    if method is None:
        of_frozen_layer[tokens] = len(kernels)
    elif tokens in of_frozen_layer:
        forward, backward, _ = A_MICROBATCH.get(method.removesuffix("-ga"), (None, None, None))
        operations = forward and forward + backward
        added = len(kernels) - of_frozen_layer[tokens]
        figure(**vars(added_kernels(f"{name}: kernels beyond the frozen layer's", added, operations)))


@pytest.mark.gpu("rotations-time")
@pytest.mark.slow
@by_method
def test_time_of_the_blocks_of_a_layers_rotations(figure, method):
    state = random_state(SIZES.shard, method)
    step = AdaptersStep(state.model_chunks)
    if not step.layers:
        pytest.skip("a method without rotations")

    def begin_and_finish() -> None:
        step.begin()
        step.finish(state.model_chunks)

    taken = milliseconds(begin_and_finish, SIZES.turns)
    note = f"{len(kernels_of(begin_and_finish))} kernels, once a step"
    figure(f"{method}: blocks of a layer and their gradients", taken, unit="ms", note=note)


@pytest.mark.gpu("rotations-time")
@pytest.mark.slow
@pytest.mark.parametrize("group", SIZES.groups)
def test_time_of_urnn_by_fourier_transforms_and_by_blocks(figure, group):
    features = max(group, NUM_FEATURES if device().type == "cuda" else NUM_FEATURES // 16)
    taken = {way: milliseconds(step, SIZES.turns) for way, step in crossover_steps(group, features).items()}
    note = f"blocks {taken['dense']:.3f} ms; Fourier {taken['fourier']:.3f} ms; blocks are used up to {DENSE_UP_TO}"
    figure(f"uRNN, groups of {group}: Fourier / blocks", taken["fourier"] / taken["dense"], note=note)


@pytest.mark.gpu("model-speed")
@pytest.mark.slow
@pytest.mark.parametrize(("way", "transformer"), {"kept": {}, "recomputed": FULL_RECOMPUTE}.items())
def test_speed_of_lora(figure, way, transformer):
    """A step in bf16; recomputed activations are no operations of the model."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    state = random_state(SIZES.model, "lora", transformer=transformer, training=ONE_ROW)
    batch = [random_microbatch(state.shape, SIZES.model_tokens)]
    taken = milliseconds(lambda: train_step(state, batch), SIZES.turns)
    flops = ModelFlops.of(state.shape, is_frozen=True).count(SIZES.model_tokens, batch[0].num_pairs)
    rate, peak = 1000 * SIZES.model_tokens / taken, memory_bytes()[1] / 2**30
    note = f"{taken:.1f} ms a step, {rate:,.0f} tokens/s, peak {peak:.1f} GiB"
    figure(f"LoRA, {way} activations", flops / taken / 1e9, unit="TFLOP/s", note=note)
