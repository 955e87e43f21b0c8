"""Programs that fail on one rank or on all; started on ranks by test_failure.py."""

from __future__ import annotations

import time
from typing import NoReturn

import torch
import torch.distributed as dist

from megatron_peft.config import ConfigurationError
from megatron_peft.runtime.failure import run_together


def main(case: str) -> None:
    dist.init_process_group("gloo")
    run_together(lambda: CASES[case](dist.get_rank()), "program")
    dist.destroy_process_group()
    print("ended well", flush=True)


def _fail(error: Exception) -> NoReturn:
    print(f"raised at {time.time()}", flush=True)
    raise error


def _configuration_on_one(rank: int) -> None:
    if rank == dist.get_world_size() - 1:
        _fail(ConfigurationError("--lr is wrong."))
    dist.all_reduce(torch.zeros(1))


def _configuration_on_all(rank: int) -> None:
    _fail(ConfigurationError("--lr is wrong."))


def _error_on_one(rank: int) -> None:
    if rank == dist.get_world_size() - 1:
        _fail(RuntimeError("lost"))
    dist.all_reduce(torch.zeros(1))


def _error_on_the_first(rank: int) -> None:
    if rank == 0:
        _fail(RuntimeError("lost"))
    dist.all_reduce(torch.zeros(1))


def _no_error(rank: int) -> None:
    time.sleep(0.7 * rank)  # longer than the others look at the board


CASES = {
    "configuration on one": _configuration_on_one,
    "configuration on all": _configuration_on_all,
    "error on one": _error_on_one,
    "error on the first": _error_on_the_first,
    "no error": _no_error,
}
