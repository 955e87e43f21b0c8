"""The state of a run, and what a checkpoint holds beside parameters: optimizer state and random generators."""

import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import safetensors.torch
import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
from safetensors import SafetensorError
from torch import Tensor

from megatron_peft.checkpoint.run_record import BestValidation
from megatron_peft.checkpoint.tensors import (
    Sharded,
    Target,
    data_of,
    global_slices,
    is_whole,
    master_key,
    sharded_parameters,
)
from megatron_peft.config import ConfigurationError, PeftConfig, RunConfig
from megatron_peft.config.untrusted import parse_json
from megatron_peft.models.shape import ModelShape
from megatron_peft.runtime.launch import gather_over_world


@dataclass
class Position:
    """How far a run has come, counted over all ranks. `consumed_samples` is also the position in the data."""

    iteration: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0


@dataclass
class TrainingState:
    """One rank's share of a run: everything that a checkpoint saves and a resumed run restores."""

    config: RunConfig
    shape: ModelShape
    model_chunks: list[DistributedDataParallel]  # one for each virtual pipeline stage
    optimizer: MegatronOptimizer
    schedule: OptimizerParamScheduler
    position: Position = field(default_factory=Position)
    data_digest: str | None = None  # of the training data, if known
    tokenizer_digest: str | None = None  # with its chat template, if known
    best: BestValidation = BestValidation()
    longest_sample: int | None = None  # of the training data, if known

    @property
    def peft(self) -> PeftConfig:
        return self.config.peft

    @property
    def lr(self) -> float:
        """The peak rate of the schedule: --lr, or a checkpoint's."""
        return self.schedule.max_lr

    @property
    def clip_grad(self) -> float:
        return self.config.optimizer.clip_grad

    @property
    def iteration(self) -> int:
        """Steps taken before the present one."""
        return self.position.iteration

    @property
    def entries(self) -> list[Sharded]:
        """What is saved of the model."""
        chunks = [chunk.module for chunk in self.model_chunks]
        return sharded_parameters(chunks, only_adapters=self.peft.trains_adapters)

    def advance(self, num_positions: int) -> None:
        """The position after a step that `num_positions` tokens went through."""
        self.position.iteration += 1
        self.position.consumed_samples += self.config.global_batch_size
        self.position.consumed_tokens += num_positions


NOT_IN_STATE = ("init_lr", "wsd_decay_steps", "lr_wsd_decay_style")  # of a schedule's values


def schedule_state(schedule: OptimizerParamScheduler) -> dict[str, Any]:
    """megatron-core's state of a schedule, and what that leaves out."""
    left_out = {name: getattr(schedule, name) for name in NOT_IN_STATE}
    return {**schedule.state_dict(), **left_out, "wsd_decay_steps": schedule.wsd_decay_steps or 0}


@contextmanager
def whole_parameters(model_chunks: Sequence[DistributedDataParallel]) -> Iterator[None]:
    """Gather parameters now. With --overlap-param-gather only the next training forward would do so. May be nested."""
    wanted = [chunk for chunk in model_chunks if chunk.ddp_config.overlap_param_gather]
    overlaps = [chunk for chunk in wanted if chunk.remove_forward_pre_hook_handles]  # empty inside another `with`
    for chunk in overlaps:
        chunk.disable_forward_pre_hook()
    try:
        yield
    finally:
        for chunk in overlaps:
            chunk.enable_forward_pre_hook()


# The distributed optimizer cuts each flattened parameter anywhere, but checkpoints hold rectangular slices of global
# tensors, which any layout can read. A shard of a matrix is at most three of them: the rest of a row, whole rows, the
# start of a row.


@dataclass(frozen=True)
class TensorSlice:
    """Contiguous elements of a row-major tensor: `start` in the flattened tensor, corner and sides in the tensor."""

    start: int
    offset: tuple[int, ...]
    shape: tuple[int, ...]


def slices_of_range(start: int, end: int, shape: Sequence[int]) -> Iterator[TensorSlice]:
    """Elements start ... end - 1 of a flattened tensor of `shape` as slices of the tensor, in order."""
    sizes = [math.prod(shape[dim + 1 :]) for dim in range(max(len(shape), 1))]  # of what each dim counts
    while start < end:
        # The outermost dim of which something begins here and is whole before the end: rows, or elements of a row.
        dim, size = next((dim, size) for dim, size in enumerate(sizes) if start % size == 0 and start + size <= end)
        offset = tuple(map(int, np.unravel_index(start, shape)))
        count = min((end - start) // size, shape[dim] - offset[dim]) if shape else 1
        yield TensorSlice(start, offset, (*[1] * dim, count, *shape[dim + 1 :]) if shape else ())
        start += count * size


# Optimizer state is stored by parameter, so that neither the layout nor the kind of optimizer matters. (megatron-core's
# own keys differ between optimizers, and depend on the data-parallel size or gather the whole state on one rank.)
#
#     optimizer.master.<key>       float32 copy of a bf16 parameter
#     optimizer.exp_avg.<key>      Adam's moments, or SGD's momentum_buffer; shaped like the parameter

MOMENTS = ("exp_avg", "exp_avg_sq", "momentum_buffer")


@dataclass(frozen=True)
class OptimizerParam:
    """A parameter as the optimizer updates it."""

    parameter: Tensor  # of the model, whole on this tensor-parallel rank
    master: Tensor  # what the optimizer updates: the parameter, a shard of it, or a float32 copy of either
    start: int  # where the shard begins in the flattened parameter
    is_sharded: bool  # each data-parallel rank holds a shard; otherwise each holds all of it
    inner: torch.optim.Optimizer  # torch's, Apex's or Transformer Engine's
    group: dict[str, Any]  # of parameters, of `inner`

    @property
    def state(self) -> dict[str, Any]:
        """What the optimizer keeps of the parameter: its moments, by their names."""
        return self.inner.state[self.master]

    @property
    def steps(self) -> int:
        """Updates so far, which the optimizer counts for the parameter or for its group."""
        return int(self.state.get("step", self.group.get("step", 0)))

    def set_steps(self, steps: int) -> None:
        """torch counts steps per parameter, fused optimizers per group."""
        if isinstance(self.inner, torch.optim.Adam):
            self.state["step"] = torch.tensor(float(steps))
        else:
            self.group["step"] = steps


def optimizer_params(
    optimizer: MegatronOptimizer, entries: Sequence[Sharded]
) -> Iterator[tuple[OptimizerParam, Sharded]]:
    """The parameters that this rank's optimizer updates, each with its place in the global tensor."""
    entry_of = {id(entry.data): entry for entry in entries}
    entry_of_master = {id(getattr(entry.data, "main_param", entry.data)): entry for entry in entries}
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if part.is_stub_optimizer:  # a rank without trainable parameters
            continue
        inner, groups = part.optimizer, part.optimizer.param_groups
        if isinstance(part, DistributedOptimizer):
            for parameter, (group_index, place) in part.model_param_group_index_map.items():
                group, start = groups[group_index], part._get_model_param_range_map(parameter)["param"].start
                param = OptimizerParam(parameter, group["params"][place], start, True, inner, group)
                yield param, entry_of[id(parameter)]
        else:
            for group in groups:
                for master in group["params"]:
                    entry = entry_of_master[id(master)]
                    yield OptimizerParam(data_of(entry), master, 0, False, inner, group), entry


def optimizer_tensors(optimizer: MegatronOptimizer, entries: Sequence[Sharded]) -> list[ShardedTensor]:
    """This rank's optimizer state, to be written."""
    return [
        tensor
        for param, entry in optimizer_params(optimizer, entries)
        for key, state in _state_tensors(param, entry.key)
        for tensor in _slices_of_state(param, entry, key, state)
    ]


def optimizer_targets(
    optimizer: MegatronOptimizer, entries: Sequence[Sharded], stored: Mapping[str, Any]
) -> list[Target]:
    """What to read into this rank's optimizer; allocates zeros for every moment that is stored.

    A float32 copy that is not stored is read from the parameter's own tensor, which a float32 run wrote.
    """
    targets = []
    for param, entry in optimizer_params(optimizer, entries):
        moments = [name for name in MOMENTS if f"optimizer.{name}.{entry.key}" in stored]
        param.state.update({name: torch.zeros_like(param.master, requires_grad=False) for name in moments})
        for key, tensor in _state_tensors(param, entry.key):
            slices = [*_slices_of_state(param, entry, key if key in stored else entry.key, tensor)]
            targets.append(Target(tensor, slices, not param.is_sharded, is_whole(entry)))
    return targets


def _state_tensors(param: OptimizerParam, key: str) -> Iterator[tuple[str, Tensor]]:
    if param.master.dtype != param.parameter.dtype:  # a float32 copy
        yield master_key(key), param.master
    for name in MOMENTS:
        if param.state.get(name) is not None:
            yield f"optimizer.{name}.{key}", param.state[name]


def _slices_of_state(param: OptimizerParam, entry: Sharded, key: str, tensor: Tensor) -> Iterator[ShardedTensor]:
    """A tensor shaped like the parameter's shard, as slices of the global tensor `key`; their data are views of it."""
    flat = tensor.detach().view(-1)
    end = param.start + flat.numel()
    for whole in global_slices(entry):
        # `whole` is all of what this tensor-parallel rank holds of gate or of up; a shard may reach into both
        first = int(data_of(whole).storage_offset() - data_of(entry).storage_offset())
        numel = data_of(whole).numel()
        assert isinstance(whole.replica_id, tuple)  # (pipeline, tensor parallel, data parallel)
        for part in slices_of_range(max(param.start - first, 0), min(end - first, numel), whole.local_shape):
            begin = first + part.start - param.start
            yield ShardedTensor(
                key=key,
                data=flat[begin : begin + math.prod(part.shape)].view(part.shape),
                dtype=flat.dtype,
                local_shape=part.shape,
                global_shape=whole.global_shape,
                global_offset=tuple(a + b for a, b in zip(whole.global_offset, part.offset, strict=True)),
                axis_fragmentations=None,  # not a regular grid
                replica_id=(*whole.replica_id[:-1], 0) if param.is_sharded else whole.replica_id,
                allow_shape_mismatch=whole.allow_shape_mismatch,
            )


def steps_of(optimizer: MegatronOptimizer, entries: Sequence[Sharded]) -> dict[str, int]:
    """Updates that each parameter has had, by key, over all ranks. A collective."""
    steps = {entry.key: param.steps for param, entry in optimizer_params(optimizer, entries)}
    groups: Any = parallel_state.get_data_parallel_group(), parallel_state.get_pipeline_model_parallel_group()
    for group in groups:
        steps = {key: number for of_rank in gather_over_world(steps, group) for key, number in of_rank.items()}
    return steps


def set_steps(optimizer: MegatronOptimizer, entries: Sequence[Sharded], steps: Mapping[str, int]) -> None:
    """Set each parameter's number of updates, from which Adam corrects the bias of its moments."""
    for param, entry in optimizer_params(optimizer, entries):
        if "exp_avg" in param.state:
            param.set_steps(steps[entry.key])


# Random generators of every rank: Python's, numpy's, torch's (CPU and GPU) and megatron-core's tracker.
#
#     rng.<rank>.all         all of them by name, as a safetensors file; <rank> names the tensor-, pipeline- and
#                            data-parallel rank
#     rng.<rank>.<name>      in old checkpoints: bytes of one of them
#
# They belong to a layout and a kind of device: at another one a run keeps the generators of its own seed.

TRACKER = "tracker."
ALL = "all"


def random_states() -> dict[str, Tensor]:
    """This rank's generators by name, as bytes."""
    kind, words, *rest = cast(tuple[Any, ...], np.random.get_state(legacy=True))
    states = {
        "python": _to_bytes(random.getstate()),
        "numpy": _to_bytes([kind, words.tolist(), *rest]),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states | {f"{TRACKER}{name}": state.cpu() for name, state in _tracker().get_states().items()}


def random_tensors() -> list[ShardedTensor]:
    """This rank's generators, to be written."""
    packed = torch.frombuffer(bytearray(safetensors.torch.save(random_states())), dtype=torch.uint8)
    return [ShardedTensor.from_rank_offsets(f"{_prefix()}{ALL}", packed)]


def random_targets(stored: Mapping[str, tuple[int, ...]]) -> list[Target]:
    """Buffers for this rank's stored generators; none if they were stored at another layout."""
    buffers = {key: torch.zeros(stored[key], dtype=torch.uint8) for key in sorted(stored) if key.startswith(_prefix())}
    return [Target(data, [ShardedTensor.from_rank_offsets(key, data)], False, False) for key, data in buffers.items()]


def restore_random(filled: list[Target]) -> bool:
    """Set this rank's generators from the filled `random_targets`; False: they are another kind of device's."""
    states = {target.slices[0].key.removeprefix(_prefix()): target.tensor for target in filled}
    if ALL in states:
        try:
            states = safetensors.torch.load(bytes(states[ALL].numpy()))
        except SafetensorError as error:
            raise ConfigurationError(f"the checkpoint's random state is damaged: {error}.") from error
    tracked = {name.removeprefix(TRACKER): state for name, state in states.items() if name.startswith(TRACKER)}
    present = _tracker().get_states()
    if any(name not in tracked or tracked[name].shape != state.shape for name, state in present.items()):
        return False
    version, words, gauss = _from_bytes(states["python"])
    random.setstate((version, tuple(words), gauss))
    np.random.set_state(tuple(_from_bytes(states["numpy"])))
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available() and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])
    _tracker().set_states(tracked)
    return True


def _tracker() -> CudaRNGStatesTracker:
    tracker = tensor_parallel.get_cuda_rng_tracker()
    assert tracker is not None
    return tracker


def _prefix() -> str:
    mpu = parallel_state
    tp = f"{mpu.get_tensor_model_parallel_rank()}of{mpu.get_tensor_model_parallel_world_size()}"
    pp = f"{mpu.get_pipeline_model_parallel_rank()}of{mpu.get_pipeline_model_parallel_world_size()}"
    dp = f"{mpu.get_data_parallel_rank()}of{mpu.get_data_parallel_world_size()}"
    return f"rng.tp{tp}-pp{pp}-dp{dp}."


def _to_bytes(state: Any) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)


def _from_bytes(data: Tensor) -> Any:
    return parse_json(bytes(data.numpy()), "the checkpoint's random state")
