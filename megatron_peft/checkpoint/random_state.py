"""Random generators of every rank: Python's, numpy's, torch's (CPU and GPU) and megatron-core's tracker.

    rng.<place>.<name>      bytes; place is the rank's tensor-, pipeline- and data-parallel position

They belong to a layout: a run at another one goes on with the generators of its own seed.
"""

import json
import random
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
from torch import Tensor

from megatron_peft.checkpoint.tensors import data_of
from megatron_peft.config.untrusted import parse_json

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
