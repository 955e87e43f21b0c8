"""Write and read tensors in megatron-core's `torch_dist` format; each rank handles its own slices."""

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as torch_checkpoint
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingConfig, CheckpointingException, save_config
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedTensor, ShardedTensorFactory, is_main_replica
from megatron.core.dist_checkpointing.strategies import torch as core
from torch import Tensor, nn
from torch.distributed.checkpoint import Metadata, ReadItem, SavePlan, SavePlanner, TensorStorageMetadata
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from megatron_peft.adapters.attach import all_names, linear_layers
from megatron_peft.checkpoint.folders import FileSum, measure
from megatron_peft.checkpoint.safe_pickle import plain_reason, read_metadata
from megatron_peft.config import ConfigurationError, require
from megatron_peft.config.untrusted import require_finite
from megatron_peft.parallel.collectives import from_first_rank
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
    """What a rank has written: the place of each tensor, and size and checksum of each file, by name."""

    results: list[WriteResult]
    sums: dict[str, FileSum]


class PlannedFiles(torch_checkpoint.FileSystemWriter):
    """A write that all ranks have planned. Of replicated tensors only the first copy is written.

    torch plans in the constructor, a collective; `write` and `complete` are none, and may run in a thread.

    torch's writer, not megatron-core's: it makes no copies, starts no processes, and reports a failed rank to all,
    where megatron-core's leaves the other ranks waiting if the disk fills up during the common file or the metadata.

    snapshot: copy the tensors to CPU memory now, so that training may change them before they are written.
    Raises ConfigurationError, on every rank, if planning failed on any.
    """

    def __init__(self, tensors: Iterable[ShardedTensor], folder: Path, snapshot: bool = False) -> None:
        # One thread: torch's writer drops exceptions of the others, and the tensors that they have not written.
        super().__init__(folder, thread_count=1, sync_files=True)
        own = [tensor for tensor in tensors if is_main_replica(tensor.replica_id)]
        own = checked_together(lambda: _copies(own) if snapshot else own)
        self.folder = folder
        planner = core.MCoreSavePlanner(flatten_state_dict=False)
        with _library_errors(f"{folder} could not be written"):
            torch_checkpoint.save(core.mcore_to_pyt_state_dict(_by_key(own)), storage_writer=self, planner=planner)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """torch calls it when all is planned. Nothing is written yet."""
        self._plan, self._planner = plan, planner
        nothing_written: Future[list[WriteResult]] = Future()
        nothing_written.set_result([])
        return nothing_written

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """torch calls it at the end of its plan."""
        self._metadata = metadata

    def write(self) -> Written:
        """Write this rank's files and sync them to disk. Raises ConfigurationError if that fails."""
        with _write_errors(self.folder):
            results = super().write_data(self._plan, self._planner).value()
            names = {result.storage_data.relative_path for result in results}
            return Written(results, {name: measure(self.folder / name) for name in names})

    def write_together(
        self, publish: Callable[[Sequence[Written]], None], group: dist.ProcessGroup | None = None
    ) -> None:
        """`write` on all ranks, then `publish` on the first, with what each has written. A collective of `group`."""
        # All ranks wait here until all files are on disk: what is published is complete.
        own = checked_together(self.write, group)
        by_rank: list[Written] | None = [own] * dist.get_world_size() if dist.get_rank() == 0 else None
        dist.gather_object(own, by_rank, dst=0, group=group)
        # The other ranks wait, so that "saved" means published on every rank.
        from_first_rank(lambda: publish(by_rank or []), group)

    def complete(self, by_rank: Sequence[Written]) -> dict[str, FileSum]:
        """Write the files common to all ranks, on the first rank. Returns the sums of all ranks' files, by name."""
        with _write_errors(self.folder):
            super().finish(self._metadata, [written.results for written in by_rank])
            torch.save({}, self.folder / "common.pt")  # megatron-core expects it; we keep such values in the run record
            save_config(CheckpointingConfig("torch_dist", 1), str(self.folder))
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


class _CheckedReader(torch_checkpoint.FileSystemReader):
    """Reads by an index that was checked; torch's and megatron-core's readers would unpickle the file again."""

    def __init__(self, folder: Path, index: Metadata) -> None:
        super().__init__(folder)
        self._index = index

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._index


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


def read_index(folder: Path) -> Metadata:
    """Which tensors a checkpoint holds and where they lie, on every rank: seconds for a large model. A collective.

    Raises ConfigurationError, on every rank, when it is missing or damaged, or would run code.
    """
    return checked_together(lambda: read_metadata(folder))


def read_tensors(tensors: Iterable[ShardedTensor], folder: Path, index: Metadata) -> None:
    """Fill every rank's tensors in place. A collective.

    Raises ConfigurationError, on every rank, when a file is missing or damaged, or holds a value that is not finite.
    """
    wanted = [replace(tensor) for tensor in tensors]  # copies, because megatron-core modifies the descriptions
    planner = _LoadPlanner(
        folder,
        shapes_validation_sharded_tensors=[tensor for tensor in wanted if not tensor.allow_shape_mismatch],
        allow_shape_mismatch_sharded_tensors={tensor.key: tensor for tensor in wanted if tensor.allow_shape_mismatch},
    )
    with _library_errors(f"{folder} is damaged"), torch.no_grad():
        torch_checkpoint.load(
            core.mcore_to_pyt_state_dict(_by_key(wanted), is_loading=True),
            storage_reader=_CheckedReader(folder, index),
            planner=planner,
        )


def stored_shapes(index: Metadata) -> dict[str, tuple[int, ...]]:
    """Global shape of every tensor in a checkpoint, by key."""
    stored = index.state_dict_metadata
    return {key: tuple(tensor.size) for key, tensor in stored.items() if isinstance(tensor, TensorStorageMetadata)}


@contextmanager
def _write_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # noqa: BLE001 - the other ranks wait for the outcome, whatever the cause
        cause = "a file was cut short; is the disk full?" if "inline_container" in str(error) else error
        raise ConfigurationError(f"{folder} could not be written: {cause}") from error


@contextmanager
def _library_errors(what: str) -> Iterator[None]:
    """Turn errors that torch and megatron-core raise on all ranks into ConfigurationError with the first cause."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # megatron-core uses a name that torch has deprecated
            yield
    except torch_checkpoint.CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        if isinstance(cause, ConfigurationError):
            raise cause from error
        raise ConfigurationError(f"{what}: rank {rank}: {type(cause).__name__}: {plain_reason(cause)}") from error
    except CheckpointingException as error:
        raise ConfigurationError(f"{what}: {error}") from error


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
    """Fill the parameters in place; returns the checkpoint's index, for what else is read of it. A collective.

    Raises ConfigurationError, on every rank, if the checkpoint holds other parameters or shapes (nothing is changed
    then), or is damaged.
    """
    index = read_index(checkpoint)
    stored = stored_shapes(index)
    keys = all_names([entry.key for entry in entries])
    checked_together(lambda: _check_parameters(entries, keys, stored, checkpoint))
    wanted: list[ShardedTensor] = []
    for entry in entries:
        # A float32 parameter is read from the stored float32 copy, if there is one.
        has_copy = data_of(entry).dtype == torch.float32 and master_key(entry.key) in stored
        wanted += global_slices(replace(entry, key=master_key(entry.key)) if has_copy else entry)
    read_tensors(wanted, checkpoint, index)
    return index


def _check_parameters(
    entries: Sequence[Sharded], keys: Sequence[str], stored: Mapping[str, tuple[int, ...]], checkpoint: Path
) -> None:
    trained = {key for key in stored if not key.startswith(NOT_PARAMETERS)}
    missing, extra = sorted(set(keys) - trained), sorted(trained - set(keys))
    require(not missing, f"{checkpoint} lacks {len(missing)} parameters of this run: {_some(missing)}.")
    require(not extra, f"{checkpoint} holds {len(extra)} parameters that this run does not have: {_some(extra)}.")
    for tensor in (tensor for entry in entries for tensor in global_slices(entry)):
        require(
            tensor.allow_shape_mismatch or tuple(tensor.global_shape) == stored[tensor.key],
            f"{tensor.key} is {list(stored[tensor.key])} in {checkpoint}, but {list(tensor.global_shape)} in this run.",
        )


def _some(keys: Sequence[str]) -> str:
    return ", ".join(keys[:_NUM_NAMED_KEYS]) + (", ..." if len(keys) > _NUM_NAMED_KEYS else "")
