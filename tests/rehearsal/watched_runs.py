"""The same recorder on real gloo ranks as in a rehearsal, for several runs in one world."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_peft.models.families import read_shape
from megatron_peft.models.shape import ModelShape
from megatron_peft.rehearsal.program import RankRecord
from megatron_peft.rehearsal.rehearsed_rank import Watch, gradients, microbatch_of, moments_of, watch_run
from megatron_peft.rehearsal.requests import Lengths, RankToRehearse
from megatron_peft.runtime import cpu_kernels
from megatron_peft.runtime.fake_ranks import replaced
from megatron_peft.runtime.launch import start_model_parallel, start_world, stop_model_parallel
from megatron_peft.training.run import build_chunks
from megatron_peft.training.step import train_step
from megatron_peft.training.update import start_state
from tests.tiny_llama import VOCAB_SIZE
from tests.training.layout_runs import Job, merged

BIASES = frozenset({"linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"})
SHAPE = ModelShape("llama", 4, 96, 160, 6, 2, 20, VOCAB_SIZE, 256, linear_biases=BIASES)
BOFT: dict[str, Any] = {"boft_block_size": 2, "boft_factors": 2}
URNN: dict[str, Any] = {"urnn_block_size": 4}
METHODS: dict[str, dict[str, Any]] = {
    "full": {"method": "full"},
    "lora": {"method": "lora", "lora_rank": 4},
    "lora-ga": {"method": "lora-ga", "lora_rank": 4, "lora_ga_batches": 2},
    "boft": {"method": "boft", **BOFT},
    "urnn": {"method": "urnn", **URNN},
    "hybrid": {"method": "hybrid", "lora_rank": 4, "lora_ga_batches": 2, "hybrid_lambda": "rms", **BOFT},
    "lora bounded": {"method": "lora", "lora_rank": 4, "lora_max_norm_ratio": 1e-3},
    "projection": {"method": "boft", "boft_parametrization": "projection", **BOFT},
    "riemannian": {"method": "urnn", "urnn_update": "riemannian", "peft_lr_rotation": 0.1, **URNN},
}
TP_SP: dict[str, Any] = {"parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True}}
PP: dict[str, Any] = {"parallel": {"pipeline_model_parallel_size": 2}}
SHARDED: dict[str, Any] = {"optimizer": {"use_distributed_optimizer": True}}
INTERLEAVED: dict[str, Any] = {"parallel": {"num_layers_per_virtual_pipeline_stage": 1}}
FIXED: dict[str, Any] = {"data_settings": {"pad_to_seq_length": True}}
OVERLAP = merged(SHARDED, {"training": {"overlap_grad_reduce": True}, "optimizer": {"overlap_param_gather": True}})
RECOMPUTE: dict[str, Any] = {
    "transformer": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
}
# World size -> layouts.
LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    1: {"alone": {}, "recompute": RECOMPUTE, "packed": {"data_settings": {"pack_sequences": True}}},
    2: {
        "TP2+SP": TP_SP,
        "PP2": PP,
        "DP2 sharded": SHARDED,
        "DP2 overlap bf16": merged(OVERLAP, {"model": {"bf16": True}}),
        "PP2 interleaved": merged(PP, INTERLEAVED, FIXED),
    },
    4: {
        "TP2xPP2": merged(PP, {"parallel": {"tensor_model_parallel_size": 2}}),
        "TP2+SPxPP2 interleaved": merged(TP_SP, PP, INTERLEAVED, FIXED),
        "PP4, ends without layers": {
            "parallel": {"pipeline_model_parallel_size": 4, "pipeline_model_parallel_layout": "E|tt|tt|L"}
        },
    },
    8: {"TP2+SPxPP2xDP2 bf16": merged(TP_SP, PP, SHARDED, {"model": {"bf16": True}})},
}


@dataclass(frozen=True)
class Watched:
    """A run and the world that it needs."""

    job: Job
    world_size: int

    def of_rank(self, rank: int) -> RankToRehearse:
        config = self.job.config(self.world_size)
        shape, lengths = read_shape(self.job.base), Lengths.longest(config)
        return RankToRehearse(config, shape, rank, config.num_microbatches, lengths)


def watched(files: tuple[str, str], world_size: int, methods: Any, layouts: Any = None) -> list[Watched]:
    found, num_microbatches = [], 2 if world_size == 1 else 4
    for method, layout in product(methods, layouts or LAYOUTS[world_size]):
        settings = LAYOUTS[world_size][layout]
        sizes = settings.get("parallel", {})
        tp, pp = (sizes.get(f"{axis}_model_parallel_size", 1) for axis in ("tensor", "pipeline"))
        batch_size = 2 * num_microbatches * world_size // (tp * pp)
        batch = {"training": {"micro_batch_size": 2, "global_batch_size": batch_size}}
        groups: Any = merged(batch, settings)
        job = Job(f"{method} {layout}", *files, peft=METHODS[method], **groups)
        found.append(Watched(job, world_size))
    return found


@contextmanager
def sums_of_a_gpu() -> Iterator[None]:
    """Products of bfloat16 with sums in float32, for CPUs: as a GPU has them, without copies of their factors."""
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("bmm.dtype", lambda x, y, dtype: torch.bmm(x.to(dtype), y.to(dtype)), "CPU")
        with replaced(cpu_kernels, "sums_in_chunks", lambda grad: False):
            yield


def real_records(runs: list[Watched]) -> dict[str, RankRecord]:
    """Of this rank, by name of the job."""
    start_world()
    records = {}
    for run in runs:
        of = run.of_rank(dist.get_rank())
        num_stages = of.config.parallel.num_virtual_stages(of.shape.num_layers)
        start_model_parallel(of.config.parallel, of.config.training.seed, num_stages)
        watch = Watch({})
        with watch.watching(), sums_of_a_gpu():
            microbatches = [microbatch_of(of.lengths) for _ in range(of.num_microbatches)]
            records[run.job.name] = watch_run(watch, of, microbatches, loads=True)
        stop_model_parallel()
    return records


def longer(lengths: Lengths) -> Lengths:
    """Eight times as long."""
    return Lengths(lengths.rows, 8 * lengths.positions, tuple(8 * length for length in lengths.packed))


SECOND_STEP = "the second step"
STATE_OF_A_GENERATOR = torch.get_rng_state().numel()  # bytes


def profiled_peaks(runs: list[Watched]) -> dict[str, tuple[int, int]]:
    """What a second step of each run adds at most to the memory in use, in bytes: live storages, and torch.profiler's
    allocations."""
    from torch.profiler import ProfilerActivity, profile, record_function

    start_world()
    peaks = {}
    for run in runs:
        of = run.of_rank(0)
        start_model_parallel(of.config.parallel, of.config.training.seed)
        state = start_state(build_chunks(of.config, of.shape), of.config, of.shape, 10)
        step = [microbatch_of(longer(of.lengths)) for _ in range(2)]
        watch = Watch({})
        of_step = [one for microbatch in step for one in vars(microbatch).values() if isinstance(one, torch.Tensor)]
        parameters = [parameter for chunk in state.model_chunks for parameter in chunk.parameters()]
        watch.memory.assign("before", [*of_step, *parameters, *gradients(state.model_chunks), *moments_of(state)])
        # The profiler sees no end of what was there before it: it watches the first step too, which makes moments.
        with watch.watching(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            train_step(state, step)
            before = watch.memory.total
            watch.memory.start_peak()
            with record_function(SECOND_STEP):
                train_step(state, step)
        events = sorted(profiler.profiler.kineto_results.events(), key=lambda one: one.start_ns())  # type: ignore[union-attr]
        began = next(one.start_ns() for one in events if one.name() == SECOND_STEP)
        # States of generators, which recompute keeps, lie in the host's memory and are made by no operation.
        changes = [one for one in events if one.name() == "[memory]" and abs(one.nbytes()) != STATE_OF_A_GENERATOR]
        in_use = np.cumsum([one.nbytes() for one in changes])
        first = sum(one.start_ns() < began for one in changes)
        profilers = int(in_use[first:].max() - in_use[first - 1])
        peaks[run.job.name] = sum(watch.memory.peak().values()) - before, profilers
        stop_model_parallel()
    return peaks
