"""Tensors into and out of a folder in megatron-core's `torch_dist` format, each rank its own parts.

megatron-core describes the parts (`ShardedTensor`) and reads the files. They are written by torch's own writer rather
than by megatron-core's: it makes no copy of the tensors, starts no processes, and when a rank cannot write, all ranks
are told, whereas megatron-core's leaves the others waiting if the disk is full when the common file or the metadata
are due.
"""

import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed.checkpoint as torch_checkpoint
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingConfig, CheckpointingException, save_config
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedTensor, ShardedTensorFactory, is_main_replica
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreLoadPlanner,
    MCoreSavePlanner,
    mcore_to_pyt_state_dict,
)
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from megatron_peft.adapters.attach import all_names, linear_layers
from megatron_peft.checkpoint.folders import FileSum, measure
from megatron_peft.checkpoint.safe_pickle import plain_reason, read_metadata
from megatron_peft.config import ConfigurationError, require
from megatron_peft.runtime.launch import checked_together

Sharded = ShardedTensor | ShardedTensorFactory


def parts(sharded: Sharded) -> list[ShardedTensor]:
    """The boxes of the global tensor that a rank's tensor consists of: one, or two for a gated fc1 (gate and up).

    Copies of the descriptions, not of the data: megatron-core writes into those that it is given.
    """
    if isinstance(sharded, ShardedTensor):
        return [replace(sharded)]
    built = sharded.build()
    assert isinstance(built, list)
    return built


def data_of(sharded: Sharded) -> Tensor:
    """The rank's tensor that a description describes."""
    assert sharded.data is not None
    return sharded.data


class _LateWriter(torch_checkpoint.FileSystemWriter):
    """Lets torch agree with all ranks on who writes what; the writing itself happens when it is asked for.

    One thread: torch's writer loses what its further threads raise, and would leave out what they have not written.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, thread_count=1, sync_files=True)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        self._plan, self._planner = plan, planner
        nothing_yet: Future[list[WriteResult]] = Future()
        nothing_yet.set_result([])
        return nothing_yet

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        self._metadata = metadata

    def write_now(self) -> list[WriteResult]:
        return super().write_data(self._plan, self._planner).value()

    def finish_now(self, results: list[list[WriteResult]]) -> None:
        super().finish(self._metadata, results)


class Written(NamedTuple):
    """What a rank has written: where each tensor lies, and the sums of its files by name."""

    results: list[WriteResult]
    sums: dict[str, FileSum]


class PlannedFiles:
    """Every rank's tensors on their way into a folder; of replicas the first one.

    Making it is a collective; `write` and `finish` are not, and may run in a thread.

    Args:
        tensors: of this rank.
        folder: empty, the same on all ranks.
        snapshot: copy the tensors to the CPU's memory now, so that training may change them before they are written.

    Raises:
        ConfigurationError: on every rank, when they could not agree.
    """

    def __init__(self, tensors: Iterable[ShardedTensor], folder: Path, snapshot: bool = False) -> None:
        own = [tensor for tensor in tensors if is_main_replica(tensor.replica_id)]
        by_key: dict[str, list[ShardedBase]] = defaultdict(list)
        for tensor in checked_together(lambda: _copies(own) if snapshot else own):
            by_key[tensor.key].append(tensor)
        self.folder = folder
        self._writer = _LateWriter(folder)
        planner = MCoreSavePlanner(flatten_state_dict=False)
        with _failures_named(f"{folder} could not be written"):
            torch_checkpoint.save(mcore_to_pyt_state_dict(by_key), storage_writer=self._writer, planner=planner)

    def write(self) -> Written:
        """This rank's files, on the disk when it returns. Raises ConfigurationError if they could not be written."""
        with _write_errors_named(self.folder):
            results = self._writer.write_now()
            names = {result.storage_data.relative_path for result in results}
            return Written(results, {name: measure(self.folder / name) for name in names})

    def finish(self, written: Iterable[Written]) -> None:
        """The files that all share; for the first rank, with what every rank has written.

        megatron-core's common file holds nothing: ours is the run's record.
        """
        with _write_errors_named(self.folder):
            self._writer.finish_now([one.results for one in written])
            torch.save({}, self.folder / "common.pt")
            save_config(CheckpointingConfig("torch_dist", 1), str(self.folder))


def _copies(tensors: Iterable[ShardedTensor]) -> list[ShardedTensor]:
    try:
        return [replace(tensor, data=data_of(tensor).detach().to("cpu", copy=True)) for tensor in tensors]
    except RuntimeError as error:  # no memory
        raise ConfigurationError(f"no copy could be made to save in the background: {error}") from error


class _CheckedReader(torch_checkpoint.FileSystemReader):
    """Reads by the index that was checked. torch's and megatron-core's own readers unpickle the file a second time."""

    def __init__(self, folder: Path, index: Metadata) -> None:
        super().__init__(folder)
        self._index = index

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._index


def read_tensors(tensors: Iterable[ShardedTensor], folder: Path) -> None:
    """Fill every rank's tensors in place. A collective.

    Raises:
        ConfigurationError: on every rank, when a file is missing or damaged, or the index would run code.
    """
    index = checked_together(lambda: read_metadata(folder))
    wanted = [replace(tensor) for tensor in tensors]  # megatron-core writes into those that it is given
    by_key: dict[str, list[ShardedBase]] = defaultdict(list)
    for tensor in wanted:
        by_key[tensor.key].append(tensor)
    planner = MCoreLoadPlanner(
        shapes_validation_sharded_tensors=[tensor for tensor in wanted if not tensor.allow_shape_mismatch],
        allow_shape_mismatch_sharded_tensors={tensor.key: tensor for tensor in wanted if tensor.allow_shape_mismatch},
    )
    with _failures_named(f"{folder} is damaged"), torch.no_grad():
        torch_checkpoint.load(
            mcore_to_pyt_state_dict(by_key, is_loading=True),
            storage_reader=_CheckedReader(folder, index),
            planner=planner,
        )


def stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Global shape of every tensor in a checkpoint, by key. Raises ConfigurationError if they cannot be read."""
    stored = read_metadata(folder).state_dict_metadata
    return {key: tuple(tensor.size) for key, tensor in stored.items() if isinstance(tensor, TensorStorageMetadata)}


@contextmanager
def _write_errors_named(folder: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # noqa: BLE001 - whatever it is, the other ranks are waiting to hear of it
        raise ConfigurationError(f"{folder} could not be written: {error}") from error


@contextmanager
def _failures_named(what: str) -> Iterator[None]:
    """Turn what the two libraries raise on all ranks into ConfigurationError with the first cause."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # megatron-core calls a name that torch has renamed
            yield
    except CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        raise ConfigurationError(f"{what}: rank {rank}: {type(cause).__name__}: {plain_reason(cause)}") from error
    except CheckpointingException as error:
        raise ConfigurationError(f"{what}: {error}") from error


# Keys of the tensors in a checkpoint. Nothing here knows torch: tools look at keys without a model.

NOT_PARAMETERS = ("optimizer.", "rng.")
ADAPTER = ".adapter."


def master_key(key: str) -> str:
    """Key of the float32 copy that bf16 training keeps of a parameter."""
    return f"optimizer.master.{key}"


# The parameters that a checkpoint holds, under Megatron's keys with global layer numbers.
#
# Every key is the same at any layout: `decoder.layers.3.mlp.linear_fc1.adapter.A`. A parameter that bf16 training keeps
# in float32 as well has a second tensor, `optimizer.master.<key>`; a run in float32 reads that one.

_NAMED_KEYS = 3


def sharded_parameters(model_chunks: Sequence[nn.Module], only_adapters: bool) -> list[Sharded]:
    """This rank's parameters (and buffers of adapters) as parts of global tensors. Their `data` are the parameters.

    Args:
        model_chunks: bare, not wrapped in DistributedDataParallel.
        only_adapters: leave the base model out.
    """
    metadata = {
        "non_homogeneous_layers": True,  # a key for each layer, so that some layers only may have an adapter
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    entries = (entry for chunk in model_chunks for entry in _entries(chunk, metadata))
    return [entry for entry in entries if ADAPTER in entry.key or not only_adapters]


def _entries(chunk: nn.Module, metadata: Mapping[str, Any]) -> Iterator[Sharded]:
    """Tensors only: megatron-core also lists objects (the state of FP8 layers), which are empty here."""
    for entry in chunk.sharded_state_dict(metadata=metadata).values():  # type: ignore[operator]
        if isinstance(entry, ShardedTensor | ShardedTensorFactory):
            yield entry


def adapted_layers(model_chunks: Sequence[nn.Module]) -> tuple[str, ...]:
    """Global names of the layers with an adapter, over all ranks. A collective."""
    targets = (target for chunk in model_chunks for target in linear_layers(chunk))
    return tuple(all_names([target.name for target in targets if target.module.adapter is not None]))


def load_parameters(entries: Sequence[Sharded], checkpoint: Path) -> None:
    """Fill the parameters in place, or change nothing. A collective.

    Args:
        entries: what `sharded_parameters` gave.
        checkpoint: an iteration's folder.

    Raises:
        ConfigurationError: on every rank, if the checkpoint holds other parameters or other shapes, or is damaged.
    """
    stored = checked_together(lambda: stored_shapes(checkpoint))
    keys = all_names([entry.key for entry in entries])
    checked_together(lambda: _check_parameters(entries, keys, stored, checkpoint))
    sources = (_stored_source(entry, stored) for entry in entries)
    read_tensors([part for source in sources for part in parts(source)], checkpoint)


def _stored_source(entry: Sharded, stored: Mapping[str, Any]) -> Sharded:
    """The parameter's own tensor, or its float32 copy where the parameter has room for it."""
    key = master_key(entry.key)
    return replace(entry, key=key) if data_of(entry).dtype == torch.float32 and key in stored else entry


def _check_parameters(
    entries: Sequence[Sharded], keys: Sequence[str], stored: Mapping[str, tuple[int, ...]], checkpoint: Path
) -> None:
    trained = {key for key in stored if not key.startswith(NOT_PARAMETERS)}
    missing, left = sorted(set(keys) - trained), sorted(trained - set(keys))
    require(not missing, f"{checkpoint} lacks {len(missing)} parameters of this run: {_some(missing)}.")
    require(not left, f"{checkpoint} holds {len(left)} parameters that this run does not have: {_some(left)}.")
    for part in (part for entry in entries for part in parts(entry)):
        require(
            part.allow_shape_mismatch or tuple(part.global_shape) == stored[part.key],
            f"{part.key} is {list(stored[part.key])} in {checkpoint}, but {list(part.global_shape)} in this run.",
        )


def _some(keys: Sequence[str]) -> str:
    return ", ".join(keys[:_NAMED_KEYS]) + (", ..." if len(keys) > _NAMED_KEYS else "")
