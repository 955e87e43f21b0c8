"""A world of one rank inside the test's own process, and places in groups that do not exist."""

from collections.abc import Iterator
from contextlib import contextmanager

from megatron_peft.config import ParallelConfig
from megatron_peft.runtime.launch import start_model_parallel, start_world, stop
from tests.adapters.many_ranks import TensorParallelPlace as Place


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


def places(size: int) -> list[Place]:
    return [Place(at, size) for at in range(size)]
