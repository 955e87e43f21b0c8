"""Process groups and seeds of a run, and checks that fail on all ranks together."""

import datetime
import gc
import os
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from torch.distributed import distributed_c10d

from megatron_peft.config import ConfigurationError, ParallelConfig
from megatron_peft.runtime import cpu
from megatron_peft.runtime.cpu_kernels import keep_freed_memory

Checked = TypeVar("Checked")


read: Callable[[torch.Tensor], list[float]] = torch.Tensor.tolist  # a rehearsal's tensors have no numbers


def read_on_host(numbers: torch.Tensor) -> list[float]:
    """The numbers of a flat tensor, once the device has computed them: where training waits for it, it is here."""
    return read(numbers)


def gather_over_world(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """`value` of every rank of `group` (None: the world), in order; without torch.distributed of this process alone."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def largest_over_world(own: torch.Tensor) -> list[float]:
    """The largest of all ranks for each of as many numbers on every rank: one small all-reduce. A host-device sync."""
    dist.all_reduce(own, dist.ReduceOp.MAX)
    return read_on_host(own)


def is_on_any(own: bool) -> bool:
    """Whether it is so on any rank. A collective that costs little with many ranks."""
    if not dist.is_initialized():
        return own
    device = torch.cuda.current_device() if dist.get_backend() == "nccl" else "cpu"
    return any(largest_over_world(torch.tensor([float(own)], device=device)))


class FailedOnAnotherRank(RuntimeError):
    """Raised where another rank had an unexpected error, which that rank raises itself; the message names both."""

    on_all_ranks = True


class Failure(NamedTuple):
    """An exception as it is sent to other ranks. `is_unexpected`: it is no ConfigurationError."""

    message: str
    is_unexpected: bool


def attempt(find: Callable[[], Checked], *expected: type[Exception]) -> tuple[Any, Failure | None, Exception | None]:
    """Call `find` between two collectives, so that an exception cannot leave the other ranks waiting in the second.

    Returns its result; or its failure, and the exception too if it is unexpected: neither a ConfigurationError nor one
    of `expected`. `raise_failures` raises it after the second collective.
    """
    try:
        return find(), None, None
    except (ConfigurationError, *expected) as error:
        return None, Failure(str(error), is_unexpected=False), None
    except FailedOnAnotherRank as error:  # which has the rank in its message
        return None, Failure(str(error), is_unexpected=True), error
    except Exception as error:  # noqa: BLE001 - whatever it is, the other ranks wait for this one
        message = f"rank {place_in_world()[0]}: {type(error).__name__}: {error}"
        return None, Failure(message, is_unexpected=True), error


def raise_failures(failures: Iterable[Failure | None], own_error: Exception | None, first_alone: bool = False) -> None:
    """Raise what failed on any rank, the same `failures` on all of them; nothing if nothing has.

    Raises `own_error` where it is; FailedOnAnotherRank on the other ranks; without unexpected errors ConfigurationError
    on all, with the message of the first alone, or of all.
    """
    if own_error is not None:
        raise own_error
    found = list(dict.fromkeys(failure for failure in failures if failure is not None))
    unexpected = [failure.message for failure in found if failure.is_unexpected]
    if unexpected:
        raise FailedOnAnotherRank("\n".join(unexpected))
    if found:
        failed = ConfigurationError("\n".join(failure.message for failure in found[: 1 if first_alone else None]))
        failed.on_all_ranks = True
        raise failed


def checked_together(check: Callable[[], Checked], first_alone: bool = False) -> Checked:
    """Run `check` on every rank; if it raises on any rank, raise on all, as `raise_failures` does.

    A collective. first_alone: raise the message of the first such rank, where each looks at other data; by default all.
    """
    result, failure, error = attempt(check)
    if is_on_any(failure is not None):
        raise_failures(gather_over_world(failure), error, first_alone)
    return result


def gloo_group(timeout: datetime.timedelta = datetime.timedelta(hours=6)) -> dist.ProcessGroup:
    """Create a gloo group of all ranks, for a thread beside the main one and for long waits. A collective."""
    group: Any = dist.new_group(backend="gloo", timeout=timeout)
    return group


def from_rank(source: int, find: Callable[[], Checked], group: dist.ProcessGroup | None = None) -> Checked:
    """Return the result of `find` on the rank `source`, on all ranks. A collective, except without torch.distributed.

    Raises on all ranks as `raise_failures` does, if `find` raised; OSError becomes ConfigurationError.

    Args:
        source: The rank that runs `find`.
        find: A function whose result can be pickled.
        group: `gloo_group`, in a thread beside the main one or for a long wait; None is the world.
    """
    outcome: list[Any]  # the result, and the failure
    *outcome, error = attempt(find, OSError) if place_in_world()[0] == source else (None, None, None)
    if dist.is_initialized():
        dist.broadcast_object_list(outcome, src=source, group=group)
    raise_failures(outcome[1:], error)
    return outcome[0]


def place_in_world() -> tuple[int, int]:
    """This process's rank, and the number of ranks."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def ranks_with(key: object) -> list[int]:
    """The ranks that have this key: a node, a file system. A collective over all ranks."""
    return [rank for rank, other in enumerate(gather_over_world(key)) if other == key]


def from_first_of(key: object, find: Callable[[], Checked]) -> Checked:
    """The result of `find` on the first of the ranks with this key, on all of those. A collective over all ranks.

    Raises as `checked_together` does.
    """
    first = ranks_with(key)[0]
    return gather_over_world(checked_together(lambda: find() if place_in_world()[0] == first else None))[first]


def share_of(number: int, rank: int, num_ranks: int) -> range:
    """What a rank has of so many things, in their order."""
    return range(number * rank // num_ranks, number * (rank + 1) // num_ranks)


class PlaceOnNode(NamedTuple):
    """This process's rank on its node, the number of processes there, and the node."""

    rank: int
    size: int
    node: str


def place_on_node() -> PlaceOnNode:
    """This process's place as torchrun tells it; without torchrun its rank in the world, and the host as the node."""
    environ = os.environ
    if not dist.is_initialized():
        return PlaceOnNode(0, 1, "0")
    if environ.get("LOCAL_WORLD_SIZE"):
        return PlaceOnNode(int(environ["LOCAL_RANK"]), int(environ["LOCAL_WORLD_SIZE"]), environ.get("GROUP_RANK", "0"))
    return PlaceOnNode(dist.get_rank(), dist.get_world_size(), os.uname().nodename.replace(".", "-"))


TIMEOUT_MINUTES = ParallelConfig.distributed_timeout_minutes


@contextmanager
def world(backend: str | None = None, timeout_minutes: float = TIMEOUT_MINUTES) -> Iterator[None]:
    """`start_world`, and `stop` at the end."""
    start_world(backend, timeout_minutes)
    yield
    stop()


def start_world(backend: str | None = None, timeout_minutes: float = TIMEOUT_MINUTES) -> None:
    """Initialize torch.distributed; on CUDA use the device of LOCAL_RANK.

    A single process, with or without torchrun, needs no port and no environment variables.
    """
    cpu.install()
    has_gpu = torch.cuda.is_available()
    if has_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    else:
        keep_freed_memory()
    is_alone = os.environ.get("WORLD_SIZE", "1") == "1"
    rendezvous = {"store": dist.HashStore(), "rank": 0, "world_size": 1} if is_alone else {}
    backend = available_backend(backend)
    dist.init_process_group(
        backend=backend,
        timeout=datetime.timedelta(minutes=timeout_minutes),
        # NCCL connects at once, so that a fault of the network shows here, and barriers know their device.
        device_id=torch.device("cuda", torch.cuda.current_device()) if backend == "nccl" and has_gpu else None,
        **rendezvous,
    )


def available_backend(requested: str | None) -> str:
    """Return the backend of a world: the requested one, but gloo where NCCL has no GPU, which rank 0 reports."""
    has_gpu = torch.cuda.is_available()
    if requested == "nccl" and not has_gpu:
        if os.environ.get("RANK", "0") == "0":
            print(
                "note: --distributed-backend nccl needs a GPU, and there is none here: gloo is used",
                file=sys.stderr,
                flush=True,
            )
        return "gloo"
    return requested or ("nccl" if has_gpu else "gloo")


def wait_for_device() -> None:
    """The host waits for what it has asked of its GPU so far; a collective's `wait` lets only the GPU wait."""
    if torch.cuda.is_available():
        torch.cuda.current_stream().synchronize()


def device_setter() -> Callable[[], None]:
    """A function that makes this thread's CUDA device that of the thread which calls it; on a CPU it does nothing.

    A new thread is on device 0: there torch would open a second context, and wait for the wrong device.
    """
    if not torch.cuda.is_available():
        return lambda: None
    return partial(torch.cuda.set_device, torch.cuda.current_device())


def start_model_parallel(parallel: ParallelConfig, seed: int, num_virtual_stages: int | None = None) -> None:
    """Create megatron-core's tensor-, pipeline- and data-parallel groups and seed its generators.

    `num_virtual_stages`: model chunks of a pipeline rank under the interleaved schedule, else None.
    """
    # Groups connect when they are used. Where the world is bound to a device, torch would split each off it, in a call
    # of all ranks: 3,185 at 1,024 ranks. It would also send the single messages of an interleaved pipeline one after
    # the other, in the stream of the group's collectives, not in a stream for each pair of ranks. With two interleaved
    # stages this still holds for one direction: megatron-core sends its messages through the world.
    everyone: Any = dist.group.WORLD
    device, everyone.bound_device_id = everyone.bound_device_id, None
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=num_virtual_stages,
        distributed_timeout_minutes=parallel.distributed_timeout_minutes,  # pyright: ignore[reportArgumentType]
        create_gloo_process_groups=False,  # nothing uses a second, slower copy of each group
    )
    everyone.bound_device_id = device
    seed_generators(seed)


@contextmanager
def model_parallel(parallel: ParallelConfig, seed: int, num_virtual_stages: int | None = None) -> Iterator[None]:
    """`start_model_parallel`, and `stop_model_parallel` at the end: another layout may follow in the same world."""
    start_model_parallel(parallel, seed, num_virtual_stages)
    try:
        yield
    finally:
        stop_model_parallel()


def shorten_timeout(seconds: float) -> None:
    """Let collectives of the world and of megatron-core's groups wait at most so long. A collective."""
    dist.barrier()  # what is under way has the old one
    for group in parallel_state._global_process_group_list or [None]:  # None is the world
        distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=seconds), group)


def seed_generators(seed: int) -> None:
    """Seed the generators of Python, numpy, torch and megatron-core (for dropout; initial values do not use them).

    They differ between pipeline stages and data-parallel replicas.
    """
    stage, replica = parallel_state.get_pipeline_model_parallel_rank(), parallel_state.get_data_parallel_rank()
    generator_seed = seed + 100 * stage + 10_000 * replica
    random.seed(generator_seed)
    np.random.seed(generator_seed % 2**32)
    torch.manual_seed(generator_seed)
    tensor_parallel.model_parallel_cuda_manual_seed(generator_seed)


def stop_model_parallel() -> None:
    """Destroy megatron-core's groups, but not the world: `start_model_parallel` may be called again."""
    # This cache keeps embeddings of earlier models alive, and with them their groups.
    RotaryEmbedding.forward.cache_clear()  # pyright: ignore[reportFunctionMemberAccess]
    # `destroy_model_parallel` only drops its references; threads and sockets would stay. The first group is the world.
    for group in (parallel_state._global_process_group_list or [])[1:]:
        dist.destroy_process_group(group)
    parallel_state.destroy_model_parallel()
    if dist.is_initialized() and dist.get_backend() == dist.Backend.GLOO:
        # Models refer to themselves, and keep their groups until they are collected. A thread of each gloo group wakes
        # a hundred times a second.
        gc.collect()


def stop() -> None:
    """Destroy megatron-core's groups and the world."""
    stop_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
