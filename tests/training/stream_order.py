"""Collectives and messages that end as NCCL's do, on gloo: what is asked for appears at `wait()`, and not before.

On a GPU an asynchronous collective runs beside the program until somebody waits for it. gloo is often done by the time
that the result is read, so a wait that is missing, or a buffer that is used too early, goes unnoticed on a CPU. Here
results are poisoned until they are waited for, and buffers are watched from the call to the wait.
"""

import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import param_and_grad_buffer
from torch import Tensor

IN_PLACE = ("all_reduce", "broadcast")
OUT_OF_PLACE = ("all_gather_into_tensor", "reduce_scatter_tensor", "all_to_all_single")
MESSAGES = ("isend", "irecv", "batch_isend_irecv", "P2POp")
POISON = {torch.uint8: 0xA5, torch.int32: -987654, torch.int64: -987654}


class Call:
    """An asynchronous one, in place of torch's `Work`.

    Args:
        writes: (where its result appears at `wait`, the result).
        reads: what it may read until then.
        message: gloo's own work, for messages, which block where they are waited for.
    """

    def __init__(
        self,
        name: str,
        report: "Report",
        writes: Sequence[tuple[Tensor, Tensor]],
        reads: Sequence[Tensor],
        message: Any = None,
    ) -> None:
        self.name = f"{name} at {_place()}"
        self._report, self._writes, self._message = report, writes, message
        self._is_forgotten = name in report.forgotten
        self.is_done = False
        for target, _ in writes:
            target.detach().fill_(POISON.get(target.dtype, float("nan")))
        self._watched = [(tensor, _bits(tensor)) for tensor in (*reads, *(target for target, _ in writes))]
        report.calls.append(self)

    def wait(self, *_: Any) -> bool:
        if self.is_done or self._is_forgotten:
            return True
        self.is_done = True
        if self._message is not None:
            self._message.wait()
        if not all(torch.equal(_bits(tensor), before) for tensor, before in self._watched):
            self._report.problems.append(f"written before its wait: {self.name}")
        for target, result in self._writes:
            target.detach().copy_(result)
        self._watched, self._writes = [], []
        return True

    def is_completed(self) -> bool:
        self._report.problems.append(f"asked whether it is done, which depends on the time: {self.name}")
        return self.is_done


@dataclass
class Report:
    """All asynchronous calls so far, and what is wrong; `forgotten` names operations whose waits are taken away."""

    forgotten: frozenset[str] = frozenset()
    calls: list[Call] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def end(self) -> list[str]:
        """All problems, with the calls that nobody has waited for."""
        return [*self.problems, *(f"nobody waits: {call.name}" for call in self.calls if not call.is_done)]


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().clone().flatten().view(torch.uint8)


def _place() -> str:
    frames = [one for one in traceback.extract_stack() if "/torch/" not in one.filename and one.filename != __file__]
    return frames[-1].filename.rpartition("/")[2]


@contextmanager
def in_stream_order(forgotten: Sequence[str] = ()) -> Iterator[Report]:
    """Meanwhile torch's functions, and the names that megatron-core's and our modules have for them, are these."""
    report = Report(frozenset(forgotten))
    real = {name: getattr(dist, name) for name in (*IN_PLACE, *OUT_OF_PLACE, *MESSAGES)}
    stand_ins = _stand_ins(real, report)
    changed = []
    for module in list(sys.modules.values()):
        if module is dist or getattr(module, "__name__", "").startswith(("megatron.core", "megatron_peft")):
            for name, value in list(vars(module).items()):
                for found in (key for key, one in real.items() if one is value):
                    changed.append((module, name, value))
                    setattr(module, name, stand_ins[found])
    changed.append((param_and_grad_buffer, "_coalescing_manager", param_and_grad_buffer._coalescing_manager))
    param_and_grad_buffer._coalescing_manager = stand_ins["coalescing"]
    try:
        yield report
    finally:
        for module, name, value in changed:
            setattr(module, name, value)


def _stand_ins(real: dict[str, Any], report: Report) -> dict[str, Any]:
    together: list[list[Call]] = []  # the calls of each open coalescing manager, which are asynchronous without a word

    def asynchronous(call: Call) -> Call:
        if together:
            together[-1].append(call)
        return call

    def in_place(name: str) -> Callable[..., Any]:
        def collective(tensor: Tensor, *args: Any, async_op: bool = False, **kwargs: Any) -> Any:
            if not (async_op or together):
                return real[name](tensor, *args, **kwargs)
            result = tensor.detach().clone()
            real[name](result, *args, **kwargs)
            return asynchronous(Call(name, report, [(tensor, result)], []))

        return collective

    def out_of_place(name: str) -> Callable[..., Any]:
        def collective(output: Tensor, input: Tensor, *args: Any, async_op: bool = False, **kwargs: Any) -> Any:
            if not (output.is_contiguous() and input.is_contiguous()):
                report.problems.append(f"not contiguous: {name} at {_place()}")
            if not (async_op or together):
                return real[name](output, input, *args, **kwargs)
            result, given = torch.empty_like(output), input.detach().clone()
            real[name](result, given, *args, **kwargs)
            # A shard of the output may be the input: its own place is right from the start.
            is_shard = input.untyped_storage().data_ptr() == output.untyped_storage().data_ptr()
            call = Call(name, report, [(output, result)], [] if is_shard else [input])
            return asynchronous(call)

        return collective

    def isend(tensor: Tensor, *args: Any, **kwargs: Any) -> Call:
        return Call("isend", report, [], [tensor], real["isend"](tensor.detach().clone(), *args, **kwargs))

    def irecv(tensor: Tensor, *args: Any, **kwargs: Any) -> Call:
        result = torch.empty_like(tensor)
        return Call("irecv", report, [(tensor, result)], [], real["irecv"](result, *args, **kwargs))

    def batch(operations: Sequence[tuple[Any, ...]]) -> list[Call]:
        return [operation(*words) for operation, *words in operations]

    @contextmanager
    def coalescing(group: Any = None, device: Any = None, async_ops: bool = False) -> Iterator[Any]:
        together.append([])
        calls = together[-1]
        try:
            yield _Calls(calls)
        finally:
            together.pop()
        if not async_ops:
            _Calls(calls).wait()

    return {
        **{name: in_place(name) for name in IN_PLACE},
        **{name: out_of_place(name) for name in OUT_OF_PLACE},
        **{"isend": isend, "irecv": irecv, "batch_isend_irecv": batch, "coalescing": coalescing},
        "P2POp": lambda operation, tensor, peer=None, group=None: (operation, tensor, peer, group),
    }


@dataclass
class _Calls:
    calls: list[Call]

    def wait(self) -> None:
        for call in self.calls:
            call.wait()
