"""Faults in the calls of some ranks, one line each, planted in the processes that rehearse them."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

from megatron_peft.adapters import attach
from megatron_peft.checkpoint import save, tensors
from megatron_peft.runtime.launch import gather_over_world
from megatron_peft.training import run, step, update

Group = Callable[[], Any]
tensor: Group = parallel_state.get_tensor_model_parallel_group
data: Group = parallel_state.get_data_parallel_group
# Which ranks: those with number 1 on an axis, the first and the last of the world, all.
Ranks = Callable[[], bool]
tensor_rank: Ranks = lambda: parallel_state.get_tensor_model_parallel_rank() == 1  # noqa: E731
replica: Ranks = lambda: parallel_state.get_data_parallel_rank() == 1  # noqa: E731
stage: Ranks = lambda: parallel_state.get_pipeline_model_parallel_rank() == 1  # noqa: E731
first: Ranks = lambda: dist.get_rank() == 0  # noqa: E731
last: Ranks = lambda: dist.get_rank() == dist.get_world_size() - 1  # noqa: E731
everyone: Ranks = lambda: True  # noqa: E731
TRAIN, GRADIENTS = (step, "train_step"), (step, "finish_gradients")


def total(group: Group | None, size: int = 1, dtype: Any = torch.float32, **kwargs: Any) -> Callable[[], Any]:
    """Without a group: of the world."""
    return lambda: dist.all_reduce(torch.empty(size, dtype=dtype), group=group and group(), **kwargs)


def told(source: int) -> Callable[[], Any]:
    return lambda: dist.broadcast(torch.empty(1), dist.get_process_group_ranks(data())[source], data())


def both(*calls: Callable[[], Any]) -> Callable[[], Any]:
    return lambda: [call() for call in calls]


def used_early() -> None:
    numbers = torch.ones(4)
    handle = dist.all_reduce(numbers, group=tensor(), async_op=True)
    numbers.add_(1)
    handle.wait()  # type: ignore[union-attr]


def gathered() -> None:
    dist.all_gather(list(torch.empty(2)), torch.empty(()), group=tensor())


def added(place: Any, where: Ranks, call: Callable[[], Any], otherwise: Any = lambda: None) -> None:
    """After each call of a function, some ranks make one more call, and the others another or none."""
    owner, name = place
    usual = getattr(owner, name)

    def changed(*args: Any, **kwargs: Any) -> Any:
        result = usual(*args, **kwargs)
        call() if where() else otherwise()
        return result

    setattr(owner, name, changed)


def left_out(place: Any, where: Ranks) -> None:
    owner, name = place
    usual = getattr(owner, name)
    setattr(owner, name, lambda *args, **kwargs: None if where() else usual(*args, **kwargs))


def sent(where: Ranks, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """What some ranks send to other stages is changed; what they receive has the usual shape."""
    usual = P2PCommunicator._communicate

    def communicate(self: Any, **kwargs: Any) -> Any:
        for name in ("tensor_send_next", "tensor_send_prev"):
            if kwargs[name] is not None and where():
                kwargs[name] = change(kwargs[name])
        return usual(self, **kwargs)

    P2PCommunicator._communicate = communicate  # type: ignore[method-assign]


def message(operation: Any) -> Callable[[], Any]:
    """One with the same rank of the other stage."""
    group: Any = parallel_state.get_pipeline_model_parallel_group
    other = lambda: dist.get_process_group_ranks(group())[1 - dist.get_rank(group())]  # noqa: E731
    return lambda: operation(torch.empty(1), other(), group())


IN_TENSOR_AND_DATA: dict[str, Callable[[], None]] = {
    "the step: one tensor-parallel rank makes a call": lambda: added(TRAIN, tensor_rank, total(tensor)),
    "the step: one replica makes a call": lambda: added(TRAIN, replica, total(data)),
    "the step: one rank waits for all": lambda: added(TRAIN, last, dist.barrier),
    "the step: one rank of all leaves a sum out": lambda: left_out((step, "_divide_by_tokens"), last),
    "gradients: one tensor-parallel rank leaves its sum out": lambda: left_out(
        (step, "sum_partial_gradients_over_tensor_parallel"), tensor_rank
    ),
    "gradients: half of the ranks swap two groups": lambda: added(
        GRADIENTS,
        lambda: tensor_rank() != replica(),
        both(total(tensor), total(data)),
        both(total(data), total(tensor)),
    ),
    "gradients: one tensor-parallel rank swaps two shapes": lambda: added(
        GRADIENTS, tensor_rank, both(total(tensor, 1), total(tensor, 2)), both(total(tensor, 2), total(tensor, 1))
    ),
    "gradients: another shape": lambda: added(GRADIENTS, tensor_rank, total(tensor, 2), total(tensor)),
    "gradients: another type": lambda: added(GRADIENTS, replica, total(data, 1, torch.float64), total(data)),
    "gradients: another operation": lambda: added(GRADIENTS, tensor_rank, gathered, total(tensor)),
    "gradients: another group": lambda: added(GRADIENTS, last, total(data), total(tensor)),
    "gradients: another source": lambda: added(GRADIENTS, replica, told(1), told(0)),
    "a wait is missing": lambda: added(GRADIENTS, everyone, total(tensor, async_op=True)),
    "a wait is missing on one rank": lambda: added(GRADIENTS, last, total(None, async_op=True), total(None)),
    "a result is used before it is waited for": lambda: added(GRADIENTS, everyone, used_early),
    "the model: one tensor-parallel rank gathers names": lambda: added(
        (attach, "all_names"), tensor_rank, lambda: gather_over_world(0)
    ),
    "LoRA-GA's start: one replica makes a call": lambda: added((run, "run_schedule"), replica, total(data)),
    "LoRA-GA's start: one tensor-parallel rank makes a call": lambda: added(
        (run, "init_from_gradients"), tensor_rank, total(tensor)
    ),
    "losses at the start: one tensor-parallel rank makes a call": lambda: added(
        (step, "start_losses"), tensor_rank, total(tensor)
    ),
    "a log line: one replica gathers": lambda: added((update, "mixtures"), replica, lambda: gather_over_world(0)),
    "validation: one tensor-parallel rank makes a call": lambda: added(
        (step, "validation_loss"), tensor_rank, total(tensor)
    ),
    "validation: the first rank alone tells all": lambda: added(
        (step, "inference_mode"), first, lambda: dist.broadcast_object_list([0], 0)
    ),
    "saving: the first rank makes a call": lambda: added((save, "tensors_to_save"), first, total(None)),
    "saving: one replica gathers": lambda: added((tensors, "checked_together"), replica, lambda: gather_over_world(0)),
}
BETWEEN_STAGES: dict[str, Callable[[], None]] = {
    "a message of another shape": lambda: sent(stage, lambda x: x[:-1].contiguous()),
    "a message of another type": lambda: sent(lambda: not stage(), torch.Tensor.double),
    "a message of another shape, of one replica": lambda: sent(replica, lambda x: x.flatten()),
    "one replica sends twice": lambda: added(TRAIN, lambda: replica() and not stage(), message(dist.send)),
    "both stages send first": lambda: added(TRAIN, everyone, both(message(dist.send), message(dist.recv))),
    "one stage of one replica makes a call": lambda: added(TRAIN, lambda: stage() and replica(), total(data)),
}
# Not faults: whoever takes part in a call makes it, though others of their class do not.
SOUND: dict[str, Callable[[], None]] = {
    "one replica swaps two groups": lambda: added(
        GRADIENTS, replica, both(total(tensor), total(data)), both(total(data), total(tensor))
    ),
    "the ranks of one replica sum among themselves": lambda: added(TRAIN, replica, total(tensor)),
    "one tensor-parallel rank of each replica sums": lambda: added(TRAIN, tensor_rank, total(data)),
}
ALL = IN_TENSOR_AND_DATA | BETWEEN_STAGES | SOUND


@cache
def plant(name: str) -> None:
    """Once in a process."""
    ALL[name]()


def with_planted(name: str, call: Callable[[], Any]) -> Any:
    """In place of a call of the rehearsals, for `rehearsal._in_processes`."""
    plant(name)
    return call()
