"""A world of one rank inside the test's own process, and places in groups that do not exist."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from megatron_peft.config import ParallelConfig
from megatron_peft.runtime.launch import start_model_parallel, start_world, stop


@contextmanager
def one_rank(seed: int = 1234, with_groups: bool = True) -> Iterator[None]:
    """A world, and megatron-core's groups, with this process alone in them.

    Args:
        with_groups: False leaves megatron-core's groups to the code under test.
    """
    start_world()
    if with_groups:
        start_model_parallel(ParallelConfig(), seed)
    try:
        yield
    finally:
        stop()


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
