"""Checks on ranks that find out different things; started on ranks by test_launch.py."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel

from megatron_peft.config import ConfigurationError, ParallelConfig
from megatron_peft.runtime.launch import checked_together, start_model_parallel, start_world


def run(_: None) -> dict[str, Any]:
    start_world(ParallelConfig())
    found = {
        "result": checked_together(dist.get_rank),
        "one": _message(lambda: _complain(1, "rank 1 lacks a file.")),
        "same": _message(lambda: _complain(None, "no such folder.")),
        "different": _message(lambda: _complain(None, f"rank {dist.get_rank()} lacks a file.")),
    }
    start_model_parallel(ParallelConfig(tensor_model_parallel_size=2, world_size=2), seed=1)
    found["common"] = torch.rand(2).tolist()
    with tensor_parallel.get_cuda_rng_tracker().fork():
        found["own"] = torch.rand(2).tolist()
    return found


def _complain(rank: int | None, text: str) -> None:
    if rank in (None, dist.get_rank()):
        raise ConfigurationError(text)


def _message(check: Any) -> str:
    try:
        checked_together(check)
    except ConfigurationError as error:
        return str(error)
    return "no error"
