"""The parameters that a checkpoint holds, under Megatron's keys with global layer numbers.

Every key is the same at any layout: `decoder.layers.3.mlp.linear_fc1.adapter.A`. A parameter that bf16 training keeps
in float32 as well has a second tensor, `optimizer.master.<key>`; a run in float32 reads that one.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import nn

from megatron_peft.adapters.attach import all_names, linear_layers
from megatron_peft.checkpoint.keys import ADAPTER, NOT_PARAMETERS, master_key
from megatron_peft.checkpoint.tensors import Sharded, data_of, parts, read_tensors, stored_shapes
from megatron_peft.config import require
from megatron_peft.runtime.launch import checked_together

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
