"""Run a function on a few gloo ranks."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist
import torch.multiprocessing as mp


def run_ranks(world_size: int, function: Callable[..., None], *args: object) -> None:
    """`function(rank, *args)` on each rank; an assertion that fails on one fails the caller."""
    with tempfile.TemporaryDirectory() as folder:
        store = os.path.join(folder, "store")
        mp.start_processes(_rank, (world_size, store, function, args), nprocs=world_size, start_method="fork")


def _rank(rank: int, world_size: int, store: str, function: Callable[..., None], args: tuple) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=timedelta(seconds=60)
    )
    function(rank, *args)
    dist.destroy_process_group()
