"""What a checkpoint holds beside parameters: the optimizer's state, and the generators of every rank."""

import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
from torch import Tensor

from megatron_peft.checkpoint.tensors import Sharded, data_of, master_key, parts
from megatron_peft.config import RunConfig
from megatron_peft.config.untrusted import parse_json
from megatron_peft.models.shape import ModelShape

# A stretch of a flattened tensor as boxes of the tensor.
#
# The distributed optimizer gives a rank a stretch of each flattened parameter, cut anywhere. Files hold boxes of global
# tensors, which any other layout can read from. A stretch of a matrix is at most three: the rest of a row, whole rows,
# the start of a row.


@dataclass(frozen=True)
class Box:
    """Contiguous elements of a row-major tensor: `start` in the flattened tensor, corner and sides in the tensor."""

    start: int
    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def end(self) -> int:
        return self.start + math.prod(self.shape)


def boxes(start: int, end: int, shape: Sequence[int]) -> Iterator[Box]:
    """The elements start ... end - 1 of a flattened tensor of `shape` as boxes, in their order."""
    if start >= end:
        return
    if len(shape) <= 1:
        yield Box(start, (start,) * len(shape), (end - start,) * len(shape))
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), end // row  # whole rows: first ... last - 1
    if first > last:  # within one row
        yield from _in_row(last, start, end, shape)
        return
    yield from _in_row(first - 1, start, first * row, shape)
    if first < last:
        yield Box(first * row, (first,) + (0,) * (len(shape) - 1), (last - first, *shape[1:]))
    yield from _in_row(last, last * row, end, shape)


def _in_row(row: int, start: int, end: int, shape: Sequence[int]) -> Iterator[Box]:
    first = row * math.prod(shape[1:])
    for box in boxes(start - first, end - first, shape[1:]):
        yield Box(first + box.start, (row, *box.offset), (1, *box.shape))


# The optimizer's state by parameter, with no mention of the layout or of the kind of optimizer.
#
#     optimizer.master.<key>       float32 copy of a bf16 parameter
#     optimizer.exp_avg.<key>      Adam's moments, or momentum_buffer of SGD; shaped like the parameter
#
# megatron-core's own keys differ between the distributed optimizer and the two plain ones, and follow the number of
# data-parallel ranks or need the whole state gathered on one. Here a rank writes its stretch of each parameter as boxes
# of the global tensor, and reads whatever boxes its own layout asks for.

MOMENTS = ("exp_avg", "exp_avg_sq", "momentum_buffer")


@dataclass(frozen=True)
class Slot:
    """A parameter as the optimizer updates it.

    Args:
        parameter: of the model, whole on this tensor-parallel rank.
        master: what the optimizer updates: the parameter, a stretch of it, or a float32 copy of either.
        start: where the stretch begins in the flattened parameter.
        is_stretch: the data-parallel ranks hold a stretch each; otherwise each holds all of it.
        inner: torch's, Apex's or Transformer Engine's optimizer.
        group: of `inner` that the parameter belongs to.
    """

    parameter: Tensor
    master: Tensor
    start: int
    is_stretch: bool
    inner: torch.optim.Optimizer
    group: dict[str, Any]

    @property
    def has_copy(self) -> bool:
        return self.master.dtype != self.parameter.dtype

    @property
    def state(self) -> dict[str, Any]:
        return self.inner.state[self.master]

    @property
    def steps(self) -> int:
        return int(self.state.get("step", self.group.get("step", 0)))

    def set_steps(self, steps: int) -> None:
        """torch counts for each parameter, the fused optimizers for each group."""
        if isinstance(self.inner, torch.optim.Adam):
            self.state["step"] = torch.tensor(float(steps))
        else:
            self.group["step"] = steps


def slots(optimizer: MegatronOptimizer, entries: Sequence[Sharded]) -> Iterator[tuple[Slot, Sharded]]:
    """This rank's slots, each with the parameter's place in its global tensor."""
    places = {id(entry.data): entry for entry in entries}
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if not part.is_stub_optimizer:  # a rank without trainable parameters
            of_kind = _stretched_slots if isinstance(part, DistributedOptimizer) else _whole_slots
            yield from ((slot, places[id(slot.parameter)]) for slot in of_kind(part, entries))


def _stretched_slots(optimizer: DistributedOptimizer, entries: Sequence[Sharded]) -> Iterator[Slot]:
    for parameter, (group_index, position) in optimizer.model_param_group_index_map.items():
        group = optimizer.optimizer.param_groups[group_index]
        start = optimizer._get_model_param_range_map(parameter)["param"].start
        yield Slot(parameter, group["params"][position], start, True, optimizer.optimizer, group)


def _whole_slots(optimizer: MegatronOptimizer, entries: Sequence[Sharded]) -> Iterator[Slot]:
    parameters = [data_of(entry) for entry in entries]
    by_master = {id(getattr(parameter, "main_param", parameter)): parameter for parameter in parameters}
    for group in optimizer.optimizer.param_groups:
        for master in group["params"]:
            yield Slot(by_master[id(master)], master, 0, False, optimizer.optimizer, group)


def optimizer_tensors(optimizer: MegatronOptimizer, entries: Sequence[Sharded]) -> list[ShardedTensor]:
    """Everything to write of this rank's optimizer."""
    return [
        tensor
        for slot, entry in slots(optimizer, entries)
        for key, state in _state_tensors(slot, entry.key)
        for tensor in _boxes_of(slot, entry, key, state)
    ]


def _state_tensors(slot: Slot, key: str) -> Iterator[tuple[str, Tensor]]:
    if slot.has_copy:
        yield master_key(key), slot.master
    for name in MOMENTS:
        if slot.state.get(name) is not None:
            yield _moment_key(name, key), slot.state[name]


def optimizer_targets(
    optimizer: MegatronOptimizer, entries: Sequence[Sharded], stored: Mapping[str, Any]
) -> list[ShardedTensor]:
    """What to read into this rank's optimizer: it is given zeros for every moment that is stored.

    A float32 copy that is not stored is read from the parameter's own tensor, which a float32 run wrote.
    """
    targets = []
    for slot, entry in slots(optimizer, entries):
        moments = [name for name in MOMENTS if _moment_key(name, entry.key) in stored]
        slot.state.update({name: torch.zeros_like(slot.master, requires_grad=False) for name in moments})
        for key, tensor in _state_tensors(slot, entry.key):
            targets += _boxes_of(slot, entry, key if key in stored else entry.key, tensor)
    return targets


def _moment_key(name: str, key: str) -> str:
    return f"optimizer.{name}.{key}"


def _boxes_of(slot: Slot, entry: Sharded, key: str, tensor: Tensor) -> Iterator[ShardedTensor]:
    """A tensor shaped like the slot's stretch as boxes of the global tensor `key`; their data are views of it."""
    flat = tensor.detach().view(-1)
    end = slot.start + flat.numel()
    for part in parts(entry):
        first = int(data_of(part).storage_offset() - data_of(entry).storage_offset())
        numel = data_of(part).numel()
        assert isinstance(part.replica_id, tuple)  # (pipeline, tensor parallel, data parallel)
        for box in boxes(max(slot.start - first, 0), min(end - first, numel), part.local_shape):
            own = slice(first + box.start - slot.start, first + box.end - slot.start)
            yield ShardedTensor(
                key=key,
                data=flat[own].view(box.shape),
                dtype=flat.dtype,
                local_shape=box.shape,
                global_shape=part.global_shape,
                global_offset=tuple(a + b for a, b in zip(part.global_offset, box.offset, strict=True)),
                axis_fragmentations=None,  # no regular grid
                replica_id=(*part.replica_id[:-1], 0) if slot.is_stretch else part.replica_id,
                allow_shape_mismatch=part.allow_shape_mismatch,
            )


def optimizer_steps(optimizer: MegatronOptimizer, entries: Sequence[Sharded]) -> dict[str, int]:
    """Updates that each parameter has had, by key, over all ranks. A collective."""
    own = {entry.key: slot.steps for slot, entry in slots(optimizer, entries)}
    found: list[dict[str, int]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(found, own)
    return {key: steps for rank in found for key, steps in rank.items()}


def set_optimizer_steps(optimizer: MegatronOptimizer, entries: Sequence[Sharded], steps: Mapping[str, int]) -> None:
    """Give each of this rank's parameters its count of updates, which Adam needs to correct its moments' bias."""
    for slot, entry in slots(optimizer, entries):
        if "exp_avg" in slot.state:
            slot.set_steps(steps[entry.key])


# Random generators of every rank: Python's, numpy's, torch's (CPU and GPU) and megatron-core's tracker.
#
#     rng.<place>.<name>      bytes; place is the rank's tensor-, pipeline- and data-parallel position
#
# They belong to a layout: a run at another one goes on with the generators of its own seed.

TRACKER = "tracker."


def random_tensors() -> list[ShardedTensor]:
    """This rank's generators, to be written."""
    return [_whole_tensor(f"{_prefix()}{name}", state) for name, state in _states().items()]


def random_targets(stored: Mapping[str, tuple[int, ...]]) -> list[ShardedTensor]:
    """Room for this rank's generators as they are stored; empty if the layout was another."""
    keys = sorted(key for key in stored if key.startswith(_prefix()))
    return [_whole_tensor(key, torch.zeros(stored[key], dtype=torch.uint8)) for key in keys]


def restore_random(filled: list[ShardedTensor]) -> None:
    """Set this rank's generators to what `random_targets` were filled with."""
    states = {tensor.key.removeprefix(_prefix()): data_of(tensor) for tensor in filled}
    version, words, gauss = _from_bytes(states["python"])
    random.setstate((version, tuple(words), gauss))
    np.random.set_state(tuple(_from_bytes(states["numpy"])))
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available() and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])
    tracked = {name.removeprefix(TRACKER): state for name, state in states.items() if name.startswith(TRACKER)}
    _tracker().set_states(tracked)


def _states() -> dict[str, Tensor]:
    kind, words, *rest = cast(tuple[Any, ...], np.random.get_state(legacy=True))
    states = {
        "python": _to_bytes(random.getstate()),
        "numpy": _to_bytes([kind, words.tolist(), *rest]),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    tracked = _tracker().get_states()
    return {**states, **{f"{TRACKER}{name}": state.cpu() for name, state in tracked.items()}}


def _tracker() -> CudaRNGStatesTracker:
    tracker = tensor_parallel.get_cuda_rng_tracker()
    assert tracker is not None
    return tracker


def _prefix() -> str:
    tp, pp, dp = (
        f"{rank()}of{size()}"
        for rank, size in (
            (parallel_state.get_tensor_model_parallel_rank, parallel_state.get_tensor_model_parallel_world_size),
            (parallel_state.get_pipeline_model_parallel_rank, parallel_state.get_pipeline_model_parallel_world_size),
            (parallel_state.get_data_parallel_rank, parallel_state.get_data_parallel_world_size),
        )
    )
    return f"rng.tp{tp}-pp{pp}-dp{dp}."


def _whole_tensor(key: str, data: Tensor) -> ShardedTensor:
    return ShardedTensor.from_rank_offsets(key, data)


def _to_bytes(state: Any) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)


def _from_bytes(data: Tensor) -> Any:
    return parse_json(bytes(data.numpy()), "the checkpoint's random state")


class Counters(Protocol):
    """How far a run has come, counted over all ranks; a dataclass of integers."""

    iteration: int
    consumed_samples: int
    consumed_tokens: int


class Resumable(Protocol):
    """One rank's part of a run. Attributes are those of `TrainingState`."""

    @property
    def config(self) -> RunConfig: ...

    @property
    def shape(self) -> ModelShape: ...

    @property
    def model_chunks(self) -> list[DistributedDataParallel]: ...

    @property
    def optimizer(self) -> MegatronOptimizer: ...

    @property
    def schedule(self) -> OptimizerParamScheduler: ...

    @property
    def position(self) -> Counters: ...

    @property
    def data_digest(self) -> str | None: ...
