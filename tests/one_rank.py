"""A world of one rank inside the test's own process, and places in groups that do not exist."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from megatron_peft.config import ParallelConfig
from megatron_peft.runtime.launch import start_model_parallel, start_world, stop

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@contextmanager
def one_rank(seed: int = 1234, with_groups: bool = True) -> Iterator[None]:
    """A world, and megatron-core's groups, with this process alone in them; the environment is given back at the end.

    Args:
        with_groups: False leaves megatron-core's groups to the code under test.
    """
    before = {name: os.environ.pop(name, None) for name in _VARIABLES}
    start_world(ParallelConfig())
    if with_groups:
        start_model_parallel(ParallelConfig(), seed)
    try:
        yield
    finally:
        stop()
        os.environ.update({name: value for name, value in before.items() if value is not None})
        for name in [name for name, value in before.items() if value is None]:
            os.environ.pop(name, None)


@dataclass(frozen=True)
class Place:
    """Answers like the process group of rank `at` of `of`, for code that only slices."""

    at: int
    of: int

    def rank(self) -> int:
        return self.at

    def size(self) -> int:
        return self.of


def places(size: int) -> list[Place]:
    return [Place(at, size) for at in range(size)]
