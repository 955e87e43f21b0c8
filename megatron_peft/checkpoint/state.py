"""The optimizer's state by parameter, with no mention of the layout or of the kind of optimizer.

    optimizer.master.<key>       float32 copy of a bf16 parameter
    optimizer.exp_avg.<key>      Adam's moments, or momentum_buffer of SGD; shaped like the parameter

megatron-core's own keys differ between the distributed optimizer and the two plain ones, and follow the number of
data-parallel ranks or need the whole state gathered on one. Here a rank writes its stretch of each parameter as boxes
of the global tensor, and reads whatever boxes its own layout asks for.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from torch import Tensor

from megatron_peft.checkpoint.boxes import boxes
from megatron_peft.checkpoint.keys import master_key
from megatron_peft.checkpoint.tensors import Sharded, data_of, parts

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
