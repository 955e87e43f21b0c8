"""Write and read tensors in megatron-core's `torch_dist` format; each rank handles its own slices."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as torch_checkpoint
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedTensor, ShardedTensorFactory, is_main_replica
from megatron.core.dist_checkpointing.strategies import torch as core
from torch import Tensor, nn
from torch.distributed.checkpoint import Metadata, ReadItem, SavePlan, TensorStorageMetadata
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.filesystem import _StoragePrefix
from torch.distributed.checkpoint.storage import WriteResult

from megatron_peft.adapters.attach import all_names, linear_layers
from megatron_peft.checkpoint.folders import INDEX, OPTIMIZER_FILE, FileSum, measure
from megatron_peft.checkpoint.safe_pickle import plain_reason, read_metadata, require_whole
from megatron_peft.config import ConfigurationError, require
from megatron_peft.config.untrusted import require_finite
from megatron_peft.parallel.collectives import from_first_rank_by_stage, start_broadcast
from megatron_peft.runtime.launch import checked_together

Sharded = ShardedTensor | ShardedTensorFactory


def global_slices(sharded: Sharded) -> list[ShardedTensor]:
    """The slices of the global tensor that a rank holds: one, or two for a gated fc1 (gate and up)."""
    if isinstance(sharded, ShardedTensor):
        return [replace(sharded)]  # a copy, because megatron-core modifies the description (not the data)
    built = sharded.build()
    assert isinstance(built, list)
    return built


def data_of(sharded: Sharded) -> Tensor:
    """The tensor behind a description."""
    assert sharded.data is not None
    return sharded.data


def with_data(sharded: Sharded, data: Tensor) -> Sharded:
    """The same slices of another tensor of that shape, which may be of another type."""
    own_type = {"dtype": data.dtype} if isinstance(sharded, ShardedTensor) else {}  # a factory takes its data's
    return replace(sharded, data=data, **own_type)


class Written(NamedTuple):
    """Files that a rank has written: torch's plan and results, and size and checksum of each file, by name."""

    plan: SavePlan
    results: list[WriteResult]
    sums: dict[str, FileSum]


class RankFiles:
    """This rank's files of a checkpoint. Of replicated tensors only the first copy is written.

    A rank plans alone: slices that are first copies never overlap, and `complete_files` refuses an index in which they
    do.

    torch's writer, not megatron-core's: it makes no copies, starts no processes, and reports a failed rank to all,
    where megatron-core's leaves the other ranks waiting if the disk fills up during the common file or the metadata.

    snapshot: copy the tensors to CPU memory now, so that training may change them before they are written.
    The constructor is a collective. Raises ConfigurationError, on every rank, if no copy could be made on any.
    """

    def __init__(self, tensors: Iterable[ShardedTensor], folder: Path, snapshot: bool = False) -> None:
        own = [tensor for tensor in tensors if is_main_replica(tensor.replica_id)]
        self._own = checked_together(lambda: _copies(own) if snapshot else own)
        self._folder = folder
        # One thread: torch's writer drops exceptions of the others, and the tensors that they have not written.
        self._writer = torch_checkpoint.FileSystemWriter(folder, thread_count=1, sync_files=True)

    def write(self) -> Written:
        """Write this rank's files and sync them to disk. Raises ConfigurationError if that fails."""
        with _write_errors(self._folder):
            planner = core.MCoreSavePlanner(flatten_state_dict=False)
            planner.set_up_planner(core.mcore_to_pyt_state_dict(_by_key(self._own)))
            plan = planner.create_local_plan()
            results: list[WriteResult] = []
            for kind, is_parameter in (("_", True), (OPTIMIZER_FILE, False)):  # few exports read the second file
                items = [item for item in plan.items if item.index.fqn.startswith(NOT_PARAMETERS) != is_parameter]
                of_file = replace(plan, items=items, storage_data=_StoragePrefix(f"__{dist.get_rank()}{kind}"))
                results += self._writer.write_data(of_file, planner).value() if items else []
            names = sorted({result.storage_data.relative_path for result in results})
            return Written(plan, results, {name: measure(self._folder / name) for name in names})


def write_common_files(folder: Path) -> None:
    """The files beside the tensors and their index that megatron-core expects."""
    torch.save({}, folder / "common.pt")  # for arguments, which the run record or config.json has
    save_config(CheckpointingConfig("torch_dist"), str(folder))


def complete_files(folder: Path, by_rank: Sequence[Written]) -> dict[str, FileSum]:
    """Write the files common to all ranks, on the first rank. Returns the sums of all ranks' files, by name."""
    with _write_errors(folder):
        _, index = create_default_global_save_plan([written.plan for written in by_rank])
        results = [written.results for written in by_rank]
        torch_checkpoint.FileSystemWriter(folder, sync_files=False).finish(index, results)  # synced when published
        require_whole(folder / INDEX, index)
        write_common_files(folder)
    return {name: sums for written in by_rank for name, sums in written.sums.items()}


def _copies(tensors: Iterable[ShardedTensor]) -> list[ShardedTensor]:
    try:
        return [replace(tensor, data=data_of(tensor).detach().to("cpu", copy=True)) for tensor in tensors]
    except RuntimeError as error:  # no memory
        raise ConfigurationError(f"no copy could be made to save in the background: {error}") from error


def _by_key(tensors: Iterable[ShardedTensor]) -> dict[str, list[ShardedBase]]:
    by_key: dict[str, list[ShardedBase]] = defaultdict(list)
    for tensor in tensors:
        by_key[tensor.key].append(tensor)
    return by_key


class _LoadPlanner(core.MCoreLoadPlanner):
    """Raises ConfigurationError if a slice that was read holds NaN or an infinity."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        super().__init__(**settings)
        self._folder = folder

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        assert self.metadata is not None
        file = self.metadata.storage_data[read_item.storage_index].relative_path
        require_finite(tensor, read_item.storage_index.fqn, self._folder / file)
        super().commit_tensor(read_item, tensor)


class Target(NamedTuple):
    """A tensor to be filled from a checkpoint, and who else holds the same."""

    tensor: Tensor
    slices: Sequence[ShardedTensor]  # of global tensors, by views of `tensor`
    is_on_all_replicas: bool  # on all data-parallel ranks
    is_on_all_tensor_ranks: bool


def is_whole(entry: Sharded) -> bool:
    """Whether each tensor-parallel rank holds all of the global tensor."""
    return isinstance(entry, ShardedTensor) and tuple(entry.local_shape) == tuple(entry.global_shape)


def read_tensors(targets: Sequence[Target], folder: Path, index: Metadata) -> None:
    """Fill every rank's tensors in place. What several ranks hold the first of them reads and broadcasts. A collective.

    Ranks that hold the same have their targets in the same order. index: what `read_index` gave this rank.
    Raises ConfigurationError, on every rank, when a file is missing or damaged, or holds a value that is not finite.
    """
    tensor_parallel: Any = parallel_state.get_tensor_model_parallel_group()
    replicas: Any = parallel_state.get_data_parallel_group()
    # At the layout that wrote the checkpoint these ranks wrote the values, and have just verified those files: the node
    # still has them in memory.
    own = [
        tensor
        for target in targets
        if (replicas.rank() == 0 or not target.is_on_all_replicas)
        and (tensor_parallel.rank() == 0 or not target.is_on_all_tensor_ranks)
        for tensor in target.slices
    ]
    checked_together(lambda: _read(own, folder, index))
    for target in targets:
        tensor = target.tensor.detach()
        values = tensor.contiguous().view(-1)  # a copy of a tensor that is not
        if target.is_on_all_replicas:
            start_broadcast(values, 0, replicas)()
        if target.is_on_all_tensor_ranks:  # the first has its values by now
            start_broadcast(values, 0, tensor_parallel)()
        if not tensor.is_contiguous():
            tensor.copy_(values.view_as(tensor))


def _read(tensors: Sequence[ShardedTensor], folder: Path, index: Metadata) -> None:
    wanted = [replace(tensor) for tensor in tensors]  # copies, because megatron-core modifies the descriptions
    planner = _LoadPlanner(
        folder,
        shapes_validation_sharded_tensors=[tensor for tensor in wanted if not tensor.allow_shape_mismatch],
        allow_shape_mismatch_sharded_tensors={tensor.key: tensor for tensor in wanted if tensor.allow_shape_mismatch},
    )
    reader = torch_checkpoint.FileSystemReader(folder)
    try:
        with torch.no_grad():
            # The steps of torch_checkpoint.load, which would have all ranks wait for one another, and unpickle the
            # index again, without a check.
            planner.set_up_planner(core.mcore_to_pyt_state_dict(_by_key(wanted), is_loading=True), index)
            reader.set_up_storage_reader(index, is_coordinator=False)
            reader.read_data(planner.create_local_plan(), planner).wait()
    except ConfigurationError:
        raise
    except Exception as error:  # noqa: BLE001 - a torn file raises anything, and the other ranks wait for the outcome
        message = f"{folder} is damaged: rank {dist.get_rank()}: {type(error).__name__}: {plain_reason(error)}"
        raise ConfigurationError(message) from error


def read_index(entries: Iterable[Sharded], folder: Path) -> Metadata:
    """What a checkpoint's index says of this rank's pipeline stage: its parameters, their optimizer state, generators.

    The first rank reads all of it. A collective.
    Raises ConfigurationError, on every rank, when it is missing or damaged, would run code, or has other parameters.
    """

    def read(keys_of_stages: list[set[str]]) -> list[Metadata]:
        index = read_metadata(folder)
        trained = {key for key in index.state_dict_metadata if not key.startswith(NOT_PARAMETERS)}
        keys = set().union(*keys_of_stages)
        missing, extra = sorted(keys - trained), sorted(trained - keys)
        require(not missing, f"{folder} lacks {len(missing)} parameters of this run: {_some(missing)}.")
        require(not extra, f"{folder} holds {len(extra)} parameters that this run does not have: {_some(extra)}.")
        return _of_stages(index, keys_of_stages)

    return from_first_rank_by_stage({entry.key for entry in entries}, read)


def _of_stages(index: Metadata, keys_of_stages: Sequence[set[str]]) -> list[Metadata]:
    """An index for each stage, of what its ranks may want."""
    stages = [(Metadata({}, storage_data={}), keys) for keys in keys_of_stages]
    wanted_by = {}
    for key, tensor in index.state_dict_metadata.items():
        parameter = key.split(".", 2)[2] if key.startswith("optimizer.") else key
        wanted_by[key] = [
            part
            for stage, (part, keys) in enumerate(stages)
            if parameter in keys or (key.startswith("rng.") and f"-pp{stage}of{len(stages)}-" in key)
        ]
        for part in wanted_by[key]:
            part.state_dict_metadata[key] = tensor
    for place, where in index.storage_data.items():
        for part in wanted_by[place.fqn]:
            part.storage_data[place] = where
    return [part for part, _ in stages]


def stored_shapes(index: Metadata) -> dict[str, tuple[int, ...]]:
    """Global shape of every tensor in an index, by key."""
    stored = index.state_dict_metadata
    return {key: tuple(tensor.size) for key, tensor in stored.items() if isinstance(tensor, TensorStorageMetadata)}


@contextmanager
def _write_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # noqa: BLE001 - the other ranks wait for the outcome, whatever the cause
        cause = "a file was cut short; is the disk full?" if "inline_container" in str(error) else error
        raise ConfigurationError(f"{folder} could not be written: {cause}") from error


# Every key is the same at any layout, with global layer numbers: `decoder.layers.3.mlp.linear_fc1.adapter.A`. Under
# --bf16 a parameter has a second tensor, its float32 copy `optimizer.master.<key>`, which a float32 run reads instead.

NOT_PARAMETERS = ("optimizer.", "rng.")
ADAPTER = ".adapter."
_NUM_NAMED_KEYS = 3  # in an error


def master_key(key: str) -> str:
    """Key of the float32 copy of a bf16 parameter."""
    return f"optimizer.master.{key}"


def sharded_state(chunk: Any) -> dict[str, Any]:
    """megatron-core's `sharded_state_dict` of a chunk, in which each layer has its own keys."""
    metadata = {
        "non_homogeneous_layers": True,  # a key for each layer, since only some layers may have an adapter
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    return chunk.sharded_state_dict(metadata=metadata)


def sharded_parameters(model_chunks: Sequence[nn.Module], only_adapters: bool) -> list[Sharded]:
    """Parameters (and buffers of adapters) of bare chunks as slices of global tensors. `data` are the parameters."""
    entries = (entry for chunk in model_chunks for entry in sharded_state(chunk).values())
    tensors = (entry for entry in entries if isinstance(entry, ShardedTensor | ShardedTensorFactory))  # no FP8 objects
    return [tensor for tensor in tensors if ADAPTER in tensor.key or not only_adapters]


def adapted_layers(model_chunks: Sequence[nn.Module]) -> tuple[str, ...]:
    """Global names of the layers with an adapter, over all ranks. A collective."""
    targets = (target for chunk in model_chunks for target in linear_layers(chunk))
    return tuple(all_names([target.name for target in targets if target.module.adapter is not None]))


def load_parameters(entries: Sequence[Sharded], checkpoint: Path) -> Metadata:
    """Fill the parameters in place; returns what `read_index` does, for what else is read. A collective.

    Raises ConfigurationError, on every rank, if the checkpoint holds other parameters or shapes (nothing is changed
    then), or is damaged.
    """
    index = read_index(entries, checkpoint)
    stored = stored_shapes(index)
    checked_together(lambda: _check_shapes(entries, stored, checkpoint))
    targets = []
    for entry in entries:
        # A float32 parameter is read from the stored float32 copy, if there is one.
        has_copy = data_of(entry).dtype == torch.float32 and master_key(entry.key) in stored
        slices = global_slices(replace(entry, key=master_key(entry.key)) if has_copy else entry)
        targets.append(Target(data_of(entry), slices, True, is_whole(entry)))
    read_tensors(targets, checkpoint, index)
    return index


def _check_shapes(entries: Sequence[Sharded], stored: Mapping[str, tuple[int, ...]], checkpoint: Path) -> None:
    for tensor in (tensor for entry in entries for tensor in global_slices(entry)):
        require(
            tensor.allow_shape_mismatch or tuple(tensor.global_shape) == stored[tensor.key],
            f"{tensor.key} is {list(stored[tensor.key])} in {checkpoint}, but {list(tensor.global_shape)} in this run.",
        )


def _some(keys: Sequence[str]) -> str:
    return ", ".join(keys[:_NUM_NAMED_KEYS]) + (", ..." if len(keys) > _NUM_NAMED_KEYS else "")
