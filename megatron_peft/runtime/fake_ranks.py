"""One rank of a world that does not exist: torch's fake process group, tensors without numbers, answers to reads.

All that must be replaced in torch and megatron-core for it stands here; `cpu.py` has what a real run without a GPU
needs. Use it in a process of its own: caches of torch and megatron-core would keep tensors without numbers.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from copy import copy
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import schedules
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.tensor_parallel.cross_entropy import VocabParallelCrossEntropy
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
from torch._C._distributed_c10d import FakeWork  # pyright: ignore[reportMissingImports]
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import adam
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_peft.runtime import cpu, cpu_kernels, launch


@contextmanager
def fake_world(rank: int, world_size: int) -> Iterator[None]:
    """This process is `rank` of a world of `world_size`: it sends to nobody, and what it receives is not written."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    cpu.install()
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def fake_rank(rank: int, world_size: int, of_all_ranks: Callable[[Any], Any] = lambda value: value) -> Iterator[None]:
    """A rank of `fake_world` whose tensors have no numbers and take no memory. Others may follow in the same process.

    of_all_ranks: from what this rank gives to a gather of objects, to what another rank would give.
    """
    with (
        fake_world(rank, world_size),
        replaced(launch, "read", lambda numbers: [0.0] * numbers.numel()),  # losses, ranks that want something
        _gathered(of_all_ranks),
        # Nothing is drawn: megatron-core's switch of generators would copy their real states.
        replaced(CudaRNGStatesTracker, "fork", lambda *_, **__: nullcontext()),
        shapes_as_asked(),
        _without_numbers(),
        _Answers(),
    ):
        yield


# One for all ranks of this process: torch's and our caches keep tensors, and modes do not mix.
_without_numbers = cache(lambda: FakeTensorMode(allow_non_fake_inputs=False))


@contextmanager
def _gathered(of_all_ranks: Callable[[Any], Any]) -> Iterator[None]:
    """torch would send objects as tensors, and so does megatron-core's optimizer. Of that only the sizes are sent."""

    def tell_size(value: Any, group: dist.ProcessGroup | None) -> None:
        sizes = torch.empty(dist.get_world_size(group), dtype=torch.int64)
        dist.all_gather([*sizes.split(1)], torch.empty(1, dtype=torch.int64), group)

    def gather_all(values: list[Any], value: Any, group: dist.ProcessGroup | None = None) -> None:
        tell_size(value, group)
        values[:] = [of_all_ranks(value)] * len(values)
        values[dist.get_rank(group)] = value

    def gather(value: Any, values: Any = None, dst: Any = None, group: Any = None, **_: Any) -> None:
        tell_size(value, group)
        if values is not None:
            values[:] = [of_all_ranks(value)] * len(values)

    def broadcast(values: list[Any], src: Any = None, group: Any = None, **_: Any) -> None:
        dist.broadcast(torch.empty(len(values), dtype=torch.int64), src, group)
        values[0] = Path() if values[0] is None else values[0]  # a draft's folder

    with (
        replaced(dist, "all_gather_object", gather_all),
        replaced(dist, "gather_object", gather),
        replaced(dist, "broadcast_object_list", broadcast),
    ):
        yield


class Mode(TorchDispatchMode):
    """One without the protection from torch.compile that takes a tenth of the time: nothing is compiled here."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


class _Answers(Mode):
    """Collectives are done at once; a number that megatron-core or torch reads of a tensor is 1."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            work = FakeWork().boxed()
            return work if len(func._schema.returns) == 1 else (args[0], work)
        if func is torch.ops.aten._local_scalar_dense.default and getattr(args[0], "constant", None) is None:
            dtype = args[0].dtype
            return True if dtype == torch.bool else 1.0 if dtype.is_floating_point else 1
        return func(*args, **(kwargs or {}))


@contextmanager
def replaced(owner: Any, name: str, by: Any) -> Iterator[None]:
    """An attribute of torch or megatron-core is another one meanwhile."""
    usual = getattr(owner, name)
    setattr(owner, name, by)
    try:
        yield
    finally:
        setattr(owner, name, usual)


@contextmanager
def shapes_as_asked() -> Iterator[None]:
    """A message that tells a shape has no numbers either: the next message has the shape that the schedule expects.

    From 0.17 on megatron-core's schedule expects none where shapes vary; it is that of samples of one length.
    """
    communicate, exchange = P2PCommunicator._communicate, P2PCommunicator._communicate_shapes
    shapes = schedules.get_tensor_shapes

    def of_one_length(*, config: Any, **kwargs: Any) -> Any:
        config = copy(config)
        config.variable_seq_lengths = False
        return shapes(config=config, **kwargs)

    def remembering(self: Any, *, tensor_shape: Any, **kwargs: Any) -> Any:
        self.expected_shape = tensor_shape
        return communicate(self, tensor_shape=tensor_shape, **kwargs)

    def exchanging(self: Any, *args: Any, **kwargs: Any) -> Any:
        exchange(self, *args, **kwargs)
        return self.expected_shape, self.expected_shape

    with (
        replaced(P2PCommunicator, "_communicate", remembering),
        replaced(P2PCommunicator, "_communicate_shapes", exchanging),
        replaced(schedules, "get_tensor_shapes", of_one_length),
    ):
        yield


# What a recorder must be told, in a rehearsal and in a real run alike.


def watched_batches(batch: Callable[[], AbstractContextManager[None]]) -> AbstractContextManager[None]:
    """`batch()` is entered around the messages of each torch.distributed.batch_isend_irecv."""

    def post(operations: list[Any]) -> list[Any]:
        with batch():
            return [op.op(op.tensor, op.peer, op.group, op.tag) for op in operations]

    return replaced(dist, "batch_isend_irecv", post)


@contextmanager
def watched_kernels(one_kernel: Callable[[Callable[..., Any], tuple[Any, ...]], Any]) -> Iterator[None]:
    """`one_kernel(function, args)` is called in place of each function that is one kernel on a GPU, and runs it.

    Ours, the parts of megatron-core's cross entropy between its sums over ranks, and Adam of a list of parameters.
    """
    usual = adam.adam

    def update(params: Any, gradients: Any, means: Any, variances: Any, *args: Any, **kwargs: Any) -> None:
        def run(*tensors: Any) -> Any:
            usual(*tensors, *args, **kwargs)
            return params, means, variances

        one_kernel(run, (params, gradients, means, variances))

    with ExitStack() as stack:
        for name in ("logits_max", "predicted_logits", "cross_entropy_loss", "gradients"):
            part = cpu_kernels.one_kernel_on_gpu(getattr(VocabParallelCrossEntropy, f"calculate_{name}"))
            stack.enter_context(replaced(VocabParallelCrossEntropy, f"calculate_{name}", staticmethod(part)))
        stack.enter_context(replaced(adam, "adam", update))
        stack.enter_context(replaced(cpu_kernels, "listener", one_kernel))
        yield


def watched_storages(resized: Callable[[torch.UntypedStorage], None]) -> AbstractContextManager[None]:
    """`resized` is called after a storage has another size."""
    resize = torch.UntypedStorage.resize_

    def resize_and_tell(self: torch.UntypedStorage, *args: Any) -> Any:
        result = resize(self, *args)
        resized(self)
        return result

    return replaced(torch.UntypedStorage, "resize_", resize_and_tell)


@contextmanager
def watched_schedule(mark: Callable[..., None], ended: Callable[[], None] = lambda: None) -> Iterator[None]:
    """`mark(phase, microbatch, chunk)` is called where megatron-core's schedule begins and ends a forward or backward.

    Between them, in phase "schedule", it exchanges messages. `ended()` is called after an interleaved schedule.
    """
    forward, backward = schedules.forward_step, schedules.backward_step
    interleaved = schedules.forward_backward_pipelining_with_interleaving

    def forward_step(*args: Any, **kwargs: Any) -> Any:
        place = int(kwargs.get("current_microbatch") or 0), int(kwargs.get("vp_stage") or 0)
        mark("forward", *place)
        outputs = forward(*args, **kwargs)
        mark("schedule")
        _first(outputs[0]).place_in_step = place
        return outputs

    def backward_step(input_tensor: Any, output_tensor: Any, *args: Any, **kwargs: Any) -> Any:
        mark("backward", *_first(output_tensor).place_in_step)
        gradients = backward(input_tensor, output_tensor, *args, **kwargs)
        mark("schedule")
        return gradients

    def schedule(*args: Any, **kwargs: Any) -> Any:
        losses = interleaved(*args, **kwargs)
        ended()
        return losses

    with (
        replaced(schedules, "forward_step", forward_step),
        replaced(schedules, "backward_step", backward_step),
        replaced(schedules, interleaved.__name__, schedule),
    ):
        yield


@contextmanager
def idle_steps() -> Iterator[None]:
    """A forward or backward of megatron-core's schedule computes nothing, and gives a tensor of one number."""

    def like(tensors: Any) -> Any:  # the schedule without interleaving hands lists on
        return [torch.zeros(1, 1, 1)] if isinstance(tensors, list) else torch.zeros(1, 1, 1)

    def forward_step(step: Any, iterator: Any, model: Any, number: Any, input_tensor: Any, *_: Any, **__: Any) -> Any:
        return like(input_tensor), 0

    def backward_step(input_tensor: Any, *_: Any) -> Any:
        return like(input_tensor)

    with replaced(schedules, "forward_step", forward_step), replaced(schedules, "backward_step", backward_step):
        yield


def _first(tensors: Any) -> Any:
    return tensors[0] if isinstance(tensors, list) else tensors
