"""Tensors into and out of a folder in megatron-core's `torch_dist` format, each rank its own parts.

megatron-core describes the parts (`ShardedTensor`) and reads the files. They are written by torch's own writer rather
than by megatron-core's: it makes no copy of the tensors, starts no processes, and when a rank cannot write, all ranks
are told, whereas megatron-core's leaves the others waiting if the disk is full when the common file or the metadata
are due.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as torch_checkpoint
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, CheckpointingException, save_config
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedTensor, ShardedTensorFactory, is_main_replica
from megatron.core.dist_checkpointing.strategies.torch import MCoreSavePlanner, mcore_to_pyt_state_dict
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from megatron_peft.config import ConfigurationError
from megatron_peft.runtime.launch import checked_together

Sharded = ShardedTensor | ShardedTensorFactory
_WRITER_THREADS = 2


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


def write_tensors(tensors: Iterable[ShardedTensor], folder: Path) -> None:
    """Write every rank's tensors; of replicas the first one. A collective.

    Raises:
        ConfigurationError: on every rank, when any could not write.
    """
    by_key: dict[str, list[ShardedBase]] = defaultdict(list)
    for tensor in tensors:
        if is_main_replica(tensor.replica_id):
            by_key[tensor.key].append(tensor)
    writer = torch_checkpoint.FileSystemWriter(folder, thread_count=_WRITER_THREADS, sync_files=True)
    planner = MCoreSavePlanner(flatten_state_dict=False)
    with _failures_named(f"{folder} could not be written"):
        torch_checkpoint.save(mcore_to_pyt_state_dict(by_key), storage_writer=writer, planner=planner)
    checked_together(lambda: _write_format(folder))


def read_tensors(tensors: Iterable[ShardedTensor], folder: Path) -> None:
    """Fill every rank's tensors in place. A collective.

    Raises:
        ConfigurationError: on every rank, when a file is missing or damaged.
    """
    wanted = {str(index): tensor for index, tensor in enumerate(tensors)}
    targets = {name: data_of(tensor) for name, tensor in wanted.items()}
    with _failures_named(f"{folder} is damaged"), torch.no_grad():
        loaded: Any = dist_checkpointing.load(wanted, str(folder), validate_access_integrity=False)
        for name, target in targets.items():
            target.copy_(loaded[name])  # no-op where it was filled in place


def stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Global shape of every tensor in a checkpoint, by key. Raises ConfigurationError if they cannot be read."""
    try:
        stored = dist_checkpointing.load_tensors_metadata(str(folder))
    except Exception as error:  # noqa: BLE001 - a torn pickle raises anything
        raise ConfigurationError(f"{folder} is damaged: {type(error).__name__}: {error}") from error
    return {key: tuple(tensor.global_shape) for key, tensor in stored.items()}


def _write_format(folder: Path) -> None:
    """The two small files that megatron-core looks for. Its common file holds nothing: ours is the run's record."""
    if dist.get_rank() == 0:
        try:
            torch.save({}, folder / "common.pt")
            save_config(CheckpointingConfig("torch_dist", 1), str(folder))
        except (OSError, RuntimeError) as error:  # torch's zip writer turns some errors into RuntimeError
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
        raise ConfigurationError(f"{what}: rank {rank}: {type(cause).__name__}: {cause}") from error
    except CheckpointingException as error:
        raise ConfigurationError(f"{what}: {error}") from error
